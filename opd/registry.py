"""Backends by name: the built-in ones, and those that other distributions offer."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from opd.backend import Backend
from opd.errors import BackendError
from opd.types import ModelOptions


@dataclass(frozen=True)
class Entry:
    """A built-in backend: `target` is called with the model options; `package` must be importable; `extra` installs it."""

    target: str
    package: str
    extra: str


BUILT_IN = {
    "mlx": Entry("opd_mlx:load", "mlx", "mlx"),
    "cuda": Entry("opd_torch:load_cuda", "torch", "cuda"),
    "cpu": Entry("opd_torch:load_cpu", "torch", "cuda"),
}

QUANTIZE = "opd_mlx:quantize"
"""Called with a model's folder, a folder to write, and bits per weight."""

GROUP = "opd.backends"
"""Entry point group in which other distributions offer backends: a callable from ModelOptions to a Backend."""


def names() -> list[str]:
    """Names of all backends, built in first, whether or not they can run here."""
    return [*BUILT_IN, *(entry.name for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN)]


def automatic() -> str:
    """The backend of this machine: mlx on Apple silicon, cuda where torch sees a GPU, else cpu (or mlx where there is no torch)."""
    apple = platform.system() == "Darwin" and platform.machine() == "arm64"
    if find_spec("mlx") and (apple or not find_spec("torch")):
        return "mlx"
    if find_spec("torch"):
        import torch

        return "cuda" if torch.cuda.is_available() else "cpu"
    raise BackendError('no backend is installed: pip install "vision-opd[mlx]" on a Mac, or "vision-opd[cuda]" elsewhere')


def resolve(name: str) -> str:
    """The name of an installed backend; `auto` picks this machine's. Raises BackendError where it is unknown or not installed."""
    chosen = automatic() if name == "auto" else name
    if chosen not in names():
        raise BackendError(f"unknown backend '{chosen}'; known: {', '.join(['auto', *names()])}")
    entry = BUILT_IN.get(chosen)
    if entry and find_spec(entry.package) is None:
        raise BackendError(f"backend '{chosen}' needs {entry.package}, which is not installed: pip install \"vision-opd[{entry.extra}]\"")
    return chosen


@dataclass(frozen=True)
class State:
    """Whether a backend can run here: its `device`, or what is `missing` and what to do."""

    ready: bool
    device: str
    missing: str = ""


def state(name: str) -> State:
    """What a known backend is on this machine; nothing of a model is loaded."""
    try:
        resolve(name)
    except BackendError as error:
        return State(False, "", str(error))
    if name == "mlx":
        import mlx.core as mx

        gpu = mx.default_device() == mx.Device(mx.gpu)
        return State(True, "Metal GPU" if platform.system() == "Darwin" and gpu else "CUDA GPU" if gpu else "CPU")
    if name in ("cuda", "cpu"):
        import torch

        if name == "cpu":
            threads = torch.get_num_threads()
            return State(True, f"CPU, {threads} thread{'s' if threads > 1 else ''}")
        if not torch.cuda.is_available():
            return State(False, "", "torch sees no CUDA GPU on this machine")
        return State(True, torch.cuda.get_device_name())
    return State(True, "")


def load(name: str, options: ModelOptions) -> Backend:
    """Loads the model on the named backend (`auto` picks one). Raises BackendError or ModelError."""
    chosen = resolve(name)
    if chosen in BUILT_IN:
        found = _function(BUILT_IN[chosen].target)
    else:
        found = next(entry for entry in entry_points(group=GROUP) if entry.name == chosen).load()
    return cast("Callable[[ModelOptions], Backend]", found)(options)


def quantizer() -> Callable[[Path, Path, int], None]:
    """Writes a quantised copy of a model folder, in the layout of mlx-community. Raises BackendError where MLX is not installed."""
    resolve("mlx")
    return cast("Callable[[Path, Path, int], None]", _function(QUANTIZE))


def _function(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found
