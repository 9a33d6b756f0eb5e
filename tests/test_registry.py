"""The backend that a machine gets where none is named."""

from __future__ import annotations

import pytest

from opd import registry
from opd.backend import State
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
def test_automatic_is_the_fastest_that_can_run(monkeypatch, machine, ready, expected):
    monkeypatch.setattr("platform.system", lambda: machine[0])
    monkeypatch.setattr("platform.machine", lambda: machine[1])
    monkeypatch.setattr(registry, "find_spec", lambda package: package)
    monkeypatch.setattr(registry, "state", lambda name: State(name in ready, name))
    assert registry.automatic() == expected


def test_automatic_asks_no_backend_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    monkeypatch.setattr(registry, "state", lambda name: pytest.fail(name))
    with pytest.raises(BackendError, match="no backend is installed"):
        registry.automatic()
