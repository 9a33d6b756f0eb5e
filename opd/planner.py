"""What a backend may offer, so that `opd plan` can estimate a run before any weights are there.

A backend knows the shapes of a model's parameters, roughly what its forward and backward hold, and
this machine's device. Everything else of a plan is worked out in `opd.plan`.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from opd.types import ModelOptions

Config: TypeAlias = Mapping[str, Any]
"""A config.json with all defaults of transformers."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of all parameters by Hugging Face name, in Hugging Face's layout; a tied head is
absent."""

Row: TypeAlias = tuple[float, float]
"""Bytes that a layer's backward holds of a row: for each number that a norm takes, and for each
that leaves a linear layer, or enters one whose result is added to the row."""


@dataclass(frozen=True)
class Footprint:
    """Roughly what a backend holds of a step, in bytes; the core counts the rest exactly.

    `recurrence`: bytes of a prompt's token and of a completion's in a layer with a recurrence.
    `copies`: in which layers each completion copies its prompt's keys and values. `score`: bytes of
    a head's score of two rows, held where a call has at most `scores_most` bytes of them.
    `stream`: bytes of a number between layers, all that is held where layers run again, which is
    where activations are above `recompute_above`. `backward` and `forward`: shares of one layer's
    activations that pass by in its backward, and in a forward without one.
    `frozen`: bytes of a frozen weight; `cast` and `head_copy`: of a trained weight and of a head's
    in the copies that products take, `cast_tables` where embeddings have such copies. `head`:
    float32 arrays [rows, V] in the head stage, of a chunk and of a block, and the bytes of either
    at most.
    `apply`: bytes beside the gradient in the optimizer's step, at most. `keeps_tokens`: tokens of
    prompts up to which a rollout's pass over them is kept for the gradient.
    """

    prompt: Row
    completion: Row
    patch: Row
    recurrence: tuple[float, float]
    copies: Literal["never", "windows", "always"]
    score: int
    scores_most: int
    stream: int
    recompute_above: int
    backward: float
    forward: float
    frozen: int
    cast: int
    cast_tables: bool
    head_copy: int
    head: tuple[float, float, int, int]
    apply: int
    keeps_tokens: int


@dataclass(frozen=True)
class Machine:
    """This machine's device: `memory` bytes, of which a run may take the share `usable`.

    `product` gives a call that multiplies [rows, side] by [side, side] in a type of numbers, and
    waits for the result. `resident`: the backend's `peak_memory` counts all bytes of the process.
    """

    name: str
    memory: float
    usable: float
    gpu: bool
    product: Callable[[int, int, str], Callable[[], object]]
    resident: bool = False


class Planner(Protocol):
    """What `opd plan` asks of a backend; nothing here reads weights."""

    def parameters(self, config: Config) -> Shapes:
        """Names and shapes of all parameters of a model without adapters. Raises ModelError."""

    def footprint(
        self,
        options: ModelOptions,
        config: Config,
        largest: int,
        lengths: tuple[int, int],
        here: bool,
    ) -> Footprint:
        """What the backend holds of a step.

        `lengths`: tokens of a prompt and of a completion. `largest`: numbers of the largest
        parameter. `here`: on this machine, else on a GPU of the kind that the backend runs on.
        """

    def machine(self) -> Machine:
        """This machine's device. Raises BackendError where it has none."""
