"""The backend protocol, and how a backend is found by name.

A backend holds kernels: it samples, differentiates, steps and stores. Every rule of the method (weights, schedules, randomness,
micro-batches, what a step is) is the core's. `opd.toy` is the protocol by example; `opd.testing` checks any implementation.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from opd.errors import BackendError
from opd.objective import Objective
from opd.types import Completion, FloatArray, Group, ModelOptions, Policy, Prompt, Sampling, TokenStatistics, Update, UpdateResult


class Backend(Protocol):
    """What the core asks of a backend. B prompts, n completions a prompt, T tokens of a completion.

    Every call takes many groups of unequal lengths and runs them together. The teacher begins as a copy of the student.
    """

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Elementwise sum of `values` over all processes; every process calls it with the same shape."""

    def sample(
        self, prompts: Sequence[Prompt], uniforms: FloatArray, sampling: Sampling, policy: Policy = "student"
    ) -> list[list[Completion]]:
        """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens] in [0, 1).

        Token t of completion j is the first id whose cumulative probability, in the order of the vocabulary, exceeds
        uniforms[b, j, t]; banned ids have probability 0. A completion ends with a stop token (kept) or at max_tokens.
        Raises ModelError where weights are NaN or infinite, and RunError where training made logits so.
        """

    def accumulate(self, groups: Sequence[Group], objective: Objective, split: int = 0) -> list[list[TokenStatistics]]:
        """Adds the gradient of sum(weight * ratio * divergence) to the student's; statistics of every completion of every group.

        With `split`, only so many completions of each group run at once, to hold less: prompts run once all the same, and their
        backward once, on the sum of what all completions ask of their keys and values. It changes no result.
        Where it raises (out of memory), the gradient may be gone, with what other calls added: it is added to in place, since two would not
        fit where one does. The step is to be begun again. Nothing half added is left.
        """

    def score(self, groups: Sequence[Group], objective: Objective, top: int = 0) -> list[list[TokenStatistics]]:
        """The statistics of `accumulate` without a gradient; with `top`, both policies' most likely alternatives."""

    def apply(self, update: Update) -> UpdateResult:
        """Takes one AdamW step on the gradient summed over all processes, and clears it; a step that is not finite changes nothing.

        Clipping multiplies the gradient by min(1, gradient_clip / norm).
        """

    def move_teacher(self, rate: float) -> None:
        """Moves every teacher parameter: theta_T += rate * (theta_S - theta_T), in float32; rate 1 copies, 0 does nothing."""

    def save(self, folder: Path) -> None:
        """Writes student, teacher and optimizer moments under Hugging Face tensor names as safetensors."""

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, to the bit."""

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student's weights and configuration into `folder` as a Hugging Face model (or a PEFT adapter)."""

    def tensors(self, kind: Literal["student", "teacher", "gradient"]) -> dict[str, NDArray[np.float32]]:
        """Float32 copies of all trained parameters, of the teacher's, or of the gradient accumulated so far, by Hugging Face name.

        Layouts are Hugging Face's, so that backends compare name by name. For checks and tests; the loop never calls it.
        """

    @property
    def peak_memory(self) -> int:
        """Largest number of bytes allocated on the device since the start (resident bytes of the process where no counter exists)."""

    @property
    def device(self) -> str:
        """The device in words, for people."""


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
