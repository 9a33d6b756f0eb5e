"""The backend protocol; `opd.registry` finds a backend by name.

A backend samples, differentiates, steps and stores. The core decides everything else: weights,
schedules, random numbers, micro-batches and the order of a step. `opd.testing.toy` is an example
implementation; `opd.testing.conformance` checks any implementation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from opd.objective import Objective
from opd.types import (
    Completion,
    FloatArray,
    Group,
    Policy,
    Prompt,
    Sampling,
    TokenStatistics,
    Update,
    UpdateResult,
)


class Prefill:
    """Prompts that the student has run once, for `sample` and then for `accumulate` of one step.

    `Backend.prefill` makes it. It holds what completions read of the prompts, and the graph that
    the prompts' backward needs, until `accumulate` takes them or `release` is called.
    """

    def __init__(self, prompts: Sequence[Prompt], held: object, weights: object = None) -> None:
        """`held`: whatever the backend keeps of `prompts`; `weights`: an object that stands for the
        weights that ran, another one after each change."""
        self.prompts = tuple(prompts)
        self.order = tuple(range(len(self.prompts)))
        """The place in `prompts` of the prompt of each group that `accumulate` is given."""
        self._held: object | None = held
        self._weights = weights

    def read(self, prompts: Sequence[Prompt], weights: object = None) -> object:
        """What is held, for `sample`. Raises ValueError for other weights, other prompts than those
        of the prefill, or another order."""
        return self._checked(prompts, self.prompts, weights)

    def take(self, prompts: Sequence[Prompt], weights: object = None) -> object:
        """What is held, for `accumulate`, whose groups have these `prompts`; it serves once, and
        nothing is held any more. Raises ValueError for other weights, or for other prompts than
        `order` says."""
        held = self._checked(prompts, [self.prompts[place] for place in self.order], weights)
        self.release()
        return held

    def release(self) -> None:
        """Frees what is held."""
        self._held = None

    def _checked(
        self, prompts: Sequence[Prompt], wanted: Sequence[Prompt], weights: object
    ) -> object:
        if weights is not self._weights:
            raise ValueError("the weights have changed since this prefill")
        if self._held is None:
            raise ValueError("this prefill was taken or released; it serves one step")
        if len(prompts) != len(wanted) or any(
            one is not other for one, other in zip(prompts, wanted, strict=True)
        ):
            raise ValueError("this prefill is of other prompts, or of another order of them")
        return self._held


class Backend(Protocol):
    """The operations that the core needs. B prompts, n completions of each, T tokens of a
    completion.

    Every call takes many groups of unequal lengths and runs them together. The teacher begins as a
    copy of the student.
    """

    @property
    def rank(self) -> int:
        """Index of this process."""

    @property
    def size(self) -> int:
        """Number of processes."""

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Elementwise sum of `values` over all processes; every process calls it with the same
        shape."""

    def prefill(self, prompts: Sequence[Prompt]) -> Prefill | None:
        """Runs prompts of the student so that `sample` and `accumulate` of the same step share the
        pass. None where that would not serve: where their graph is too large to be held during the
        rollout, or has other numbers than the one of `accumulate`.

        It holds for the weights as they are: use it before `apply` and `load`. Raises OutOfMemory.
        """

    def sample(
        self,
        prompts: Sequence[Prompt],
        uniforms: FloatArray,
        sampling: Sampling,
        policy: Policy = "student",
        prefill: Prefill | None = None,
    ) -> list[list[Completion]]:
        """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens] in
        [0, 1).

        Token t of completion j is the first id whose cumulative probability, in the order of the
        vocabulary, exceeds uniforms[b, j, t]; banned ids have probability 0. A completion ends with
        a stop token (kept) or at max_tokens. `prefill`: of these prompts, in this order, by the
        student; it changes no result.
        Raises ModelError if weights are NaN or infinite, RunError if logits are after training, and
        OutOfMemory if the device's memory does not suffice.
        """

    def accumulate(
        self,
        groups: Sequence[Group],
        objective: Objective,
        split: int = 0,
        prefill: Prefill | None = None,
    ) -> list[list[TokenStatistics]]:
        """Adds the gradient of sum(weight * ratio * divergence) to the student's gradient. Returns
        the statistics of every completion of every group.

        With `split` > 0, at most so many completions of each group run at once, to save memory.
        Prompts still run once, and their backward runs once, on the sum of the gradients to keys
        and values from all completions. `prefill` has run the student prompts of these groups, and
        is taken. Neither changes a result.
        The gradient is accumulated in place, since a second one might not fit. If the call raises,
        the gradient of earlier calls is lost too, and the step has to be retried. Raises
        OutOfMemory if the device's memory does not suffice.
        """

    def score(
        self, groups: Sequence[Group], objective: Objective, top: int = 0
    ) -> list[list[TokenStatistics]]:
        """The statistics of `accumulate`, without a gradient; with `top` > 0, also the `top` most
        likely tokens of both policies."""

    @property
    def attends(self) -> bool:
        """Whether `attend` knows the attention of this model."""

    def attend(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        policy: Policy = "student",
    ) -> list[list[FloatArray]]:
        """The attention of each completion's rows to the visual tokens of its prompt, averaged over
        heads: float32 [L, T, S] for each of a prompt's `completions`, which are not empty.

        L counts the layers of attention, from the first; a layer of another kind, such as a delta
        net, has no entry. Row t is the row that predicts token t, so that row 0 is the prompt's
        last token. S is in the order of `Prompt.visual`. A weight is in 0..1, a share of all that
        the row attends to: the weights of a row sum to at most 1, and the rest is on text.
        A prompt without completions gets one array [L, 1, S], of its last token alone.
        Scores are computed for these rows alone: beside a forward, the device holds the scores of
        one prompt's rows and one key-value head at a time. The result takes 4 * L * T * S bytes of
        the host for each completion, so the caller cuts many prompts into several calls. Raises
        BackendError unless `attends`, and OutOfMemory.
        """

    def apply(self, update: Update) -> UpdateResult:
        """Takes one AdamW step on the gradient summed over all processes, and clears the gradient.
        If the gradient is not finite, parameters and moments stay.

        Clipping multiplies the gradient by min(1, gradient_clip / norm).
        """

    def move_teacher(self, rate: float) -> None:
        """Moves every teacher parameter: theta_T += rate * (theta_S - theta_T), in float32. `rate`
        in 0..1; 1 copies the student, 0 does nothing."""

    def save(self, folder: Path) -> None:
        """Writes student, teacher and optimizer moments under Hugging Face tensor names as
        safetensors.

        Every process calls it, at the same time and with the same folder, which exists. Rank 0
        writes what all processes hold alike, the others what they alone hold.
        """

    def load(self, folder: Path) -> None:
        """Restores what `save` wrote, to the bit."""

    def export(self, folder: Path, kind: Literal["model", "adapter"]) -> None:
        """Writes the student's weights and configuration into `folder` as a Hugging Face model (or
        a PEFT adapter). Every process calls it, as `save`."""

    def tensors(self, kind: Literal["student", "teacher", "gradient"]) -> dict[str, NDArray[Any]]:
        """Copies of the student's trained parameters, of the teacher's, or of the gradient
        accumulated so far, by Hugging Face name: float32, or float64 if the model computes in it.

        Tensors have Hugging Face's layout, so that backends can be compared. For checks and tests
        only.
        """

    @property
    def peak_memory(self) -> int:
        """Largest number of bytes allocated on the device since the start; resident bytes of the
        process if the device has no counter."""

    @property
    def device(self) -> str:
        """The device in words."""


@dataclass(frozen=True)
class State:
    """Whether a backend can run on this machine: `ready` and the `device` in words, or what is
    `missing` and what to do. `budgets`: the most that the device holds, in bytes or tokens by
    name."""

    ready: bool
    device: str
    missing: str = ""
    budgets: Mapping[str, int] = field(default_factory=dict)
