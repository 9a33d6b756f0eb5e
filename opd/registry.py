"""Backends by name: those built in, and those that other distributions register as entry points."""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from opd.backend import Backend, State
from opd.errors import BackendError
from opd.planner import Planner
from opd.types import ModelOptions


@dataclass(frozen=True)
class Entry:
    """A built-in backend; `target`, `state` and `planner` are "module:name".

    `target` maps ModelOptions to a Backend. `state` returns a State: whether the backend can run on
    this machine. `planner` is an `opd.planner.Planner`. `package` must be importable, and the extra
    `extra` of this distribution installs it. `families_alone`: the backend trains only models of
    families that it has a file for.
    """

    target: str
    state: str
    package: str
    extra: str
    planner: str
    families_alone: bool = False


BUILT_IN = {
    "mlx": Entry(
        "opd_mlx:load", "opd_mlx:state", "mlx", "mlx", "opd_mlx.footprint:MLX", families_alone=True
    ),
    "cuda": Entry(
        "opd_torch:load_cuda",
        "opd_torch:state_of_cuda",
        "torch",
        "cuda",
        "opd_torch.footprint:CUDA",
    ),
    "cpu": Entry(
        "opd_torch:load_cpu", "opd_torch:state_of_cpu", "torch", "cuda", "opd_torch.footprint:CPU"
    ),
}

PLANNERS = "opd.planners"
"""Entry point group in which other distributions register a Planner under the name of its
backend."""

QUANTIZE = "opd_mlx:quantize"
"""The function that writes a quantised model; called with the model's folder, the folder to write,
and bits per weight."""

GROUP = "opd.backends"
"""Entry point group in which other distributions register backends: a callable from ModelOptions to
a Backend."""


def names() -> list[str]:
    """Names of all backends, those built in first, whether or not they can run on this machine."""
    return [
        *BUILT_IN,
        *(entry.name for entry in entry_points(group=GROUP) if entry.name not in BUILT_IN),
    ]


def automatic() -> str:
    """The name of this machine's backend: the fastest of those that are `ready` in their `state`.
    Raises BackendError if none is installed."""
    return fastest(platform.system(), platform.machine(), lambda name: state(name).ready)


def fastest(system: str, machine: str, ready: Callable[[str], bool]) -> str:
    """The name of the fastest backend that is `ready`: mlx on Apple silicon; elsewhere cuda, else
    cpu, else mlx. `system`, `machine`: as `platform` names them. Raises BackendError if none is."""
    apple = (system, machine) == ("Darwin", "arm64")
    for name in ("mlx", "cuda", "cpu") if apple else ("cuda", "cpu", "mlx"):
        if ready(name):
            return name
    raise BackendError(
        'no backend is installed: pip install "vision-opd[mlx]" on a Mac, or "vision-opd[cuda]"'
        " elsewhere"
    )


def resolve(name: str) -> str:
    """The name of an installed backend; `auto` becomes this machine's backend. Raises BackendError
    if the backend is unknown or not installed."""
    chosen = automatic() if name == "auto" else name
    if chosen not in names():
        raise BackendError(f"unknown backend '{chosen}'; known: {', '.join(['auto', *names()])}")
    entry = BUILT_IN.get(chosen)
    if entry and find_spec(entry.package) is None:
        raise BackendError(
            f"backend '{chosen}' needs {entry.package}, which is not installed: pip install"
            f' "vision-opd[{entry.extra}]"'
        )
    return chosen


def state(name: str) -> State:
    """Whether a backend can run on this machine, as the backend says it; loads no model."""
    try:
        resolve(name)
    except BackendError as error:
        return State(False, "", str(error))
    if name not in BUILT_IN:
        return State(True, "")
    return cast("Callable[[], State]", _function(BUILT_IN[name].state))()


def families_alone(name: str) -> bool:
    """Whether a backend trains only models of families that it has a file for."""
    return name in BUILT_IN and BUILT_IN[name].families_alone


def no_family(name: str, model_type: str) -> BackendError:
    """The BackendError for a backend with `families_alone` and a model of another type."""
    others = " or ".join(other for other in BUILT_IN if not families_alone(other))
    return BackendError(
        f"the {name} backend has no file for models of type '{model_type}'; train it with --backend"
        f" {others}"
    )


def load(name: str, options: ModelOptions) -> Backend:
    """Loads the model on the named backend (`auto` picks one). Raises BackendError or
    ModelError."""
    chosen = resolve(name)
    if chosen in BUILT_IN:
        target = _function(BUILT_IN[chosen].target)
    else:
        target = next(entry for entry in entry_points(group=GROUP) if entry.name == chosen).load()
    return cast("Callable[[ModelOptions], Backend]", target)(options)


def planner(name: str) -> Planner:
    """The Planner of a backend (`auto` picks one). Raises BackendError if the backend is not
    installed or has no planner."""
    chosen = resolve(name)
    if chosen in BUILT_IN:
        return cast("Planner", _function(BUILT_IN[chosen].planner))
    offered = [entry for entry in entry_points(group=PLANNERS) if entry.name == chosen]
    if not offered:
        raise BackendError(
            f"backend '{chosen}' offers no plan, which it would in the entry point group {PLANNERS}"
        )
    return cast("Planner", offered[0].load())


def quantizer() -> Callable[[Path, Path, int], None]:
    """The function that writes a quantised copy of a model folder, in the layout of mlx-community;
    arguments as for QUANTIZE. Raises BackendError if MLX is not installed."""
    resolve("mlx")
    return cast("Callable[[Path, Path, int], None]", _function(QUANTIZE))


def _function(target: str) -> Callable[..., Any]:
    module, name = target.split(":")
    return cast("Callable[..., Any]", getattr(importlib.import_module(module), name))
