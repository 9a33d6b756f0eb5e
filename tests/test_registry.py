"""The backend that a machine gets where none is named."""

from __future__ import annotations

import platform
import sys

import pytest

from opd import registry
from opd.errors import BackendError

MAC, LINUX, INTEL = ("Darwin", "arm64"), ("Linux", "x86_64"), ("Darwin", "x86_64")
ALL = {"mlx", "cuda", "cpu"}


@pytest.mark.parametrize(
    ("machine", "ready", "expected"),
    [
        (MAC, ALL, "mlx"),
        (MAC, {"cpu"}, "cpu"),
        (LINUX, ALL, "cuda"),
        (LINUX, {"mlx", "cpu"}, "cpu"),
        (LINUX, {"mlx"}, "mlx"),
        (INTEL, {"mlx", "cpu"}, "cpu"),
    ],
)
def test_the_fastest_that_can_run(machine, ready, expected):
    assert registry.fastest(*machine, ready.__contains__) == expected


def test_automatic_is_the_fastest_of_this_machine():
    pytest.importorskip("torch")
    name = registry.automatic()
    assert registry.state(name).ready
    ready = [one for one in registry.BUILT_IN if registry.state(one).ready]
    assert name == registry.fastest(platform.system(), platform.machine(), ready.__contains__)


def test_automatic_asks_no_backend_that_is_not_installed(monkeypatch):
    for package in ("mlx", "torch", "opd_mlx", "opd_torch"):
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    with pytest.raises(BackendError, match="no backend is installed"):
        registry.automatic()
