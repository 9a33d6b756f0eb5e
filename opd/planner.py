"""What a backend may offer, so that `opd plan` can estimate a run before any weights are there.

A backend knows the shapes of a model's parameters, roughly what its forward and backward hold, and
this machine's device. Everything else of a plan is worked out in `opd.plan`.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

from opd.types import ModelOptions

Config: TypeAlias = Mapping[str, Any]
"""A config.json with all defaults of transformers."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of all parameters by Hugging Face name, in Hugging Face's layout; a tied head is
absent."""


class Row(NamedTuple):
    """Bytes that a layer's backward holds of a row.

    They are given for each number of its `width`; of its `norms`; of what its feed-forward's
    `wide` products give; of all `query` and `key` heads; of heads that are `turned` (normalised,
    or rotated out of one product of queries, keys and values); of a `gate` on heads. In a layer
    with a recurrence `recurrence` more are held, and `passing` pass by in its backward.
    """

    width: float
    norms: float
    wide: float
    query: float
    key: float
    turned: float = 0.0
    gate: float = 0.0
    recurrence: float = 0.0
    passing: float = 0.0


class Lengths(NamedTuple):
    """Rows of a micro-batch: of each prompt `before` tokens, `completions` of `tokens` each, and
    `images` of `patches` each."""

    prompts: int
    before: int
    completions: int
    tokens: int
    images: int
    patches: int


@dataclass(frozen=True)
class Footprint:
    """What a backend holds of a step, in bytes; the core counts the rest exactly.

    `estimate`: what the backend takes activations to be; above `recompute_above` layers run again,
    and numbers between layers, of `stream` bytes, are all that is held. `backward`: the share of a
    layer's activations that passes by in its backward; `forward`: in a forward without one, the
    shares of its rows and of its recurrence. `copies`: in which layers each completion copies its
    prompt's keys and values. `blocks`: whether tokens of an image see each other. `scores`: of a
    head's score of two rows, held where a call has at most the second number of bytes; rows of a
    block, which sees no later ones; and bytes that pass by at most. `frozen`: of a frozen weight;
    `cast`: of a trained weight in the copies that products take, where layers are held and where
    they run again, `cast_tables` where embeddings have such copies; `head_copy`: of a head's weight
    in its copy. `head`: float32 arrays [rows, V] in the head stage, of a chunk and of a block, and
    the bytes of either at most; `head_late`: those of a chunk that are left where a head's gradient
    is made; 0: all. `sums`: of gradients that are added up at a time, beside the largest; None
    where a layer's own are freed before. `cache_sums`: of a number in the sums of gradients to keys
    and values that a prompt's pass gives; 0 where these stand in its graph, and have sums later.
    `apply`: beside the gradient in the optimizer's step, at most. `keeps_tokens`: tokens of prompts
    up to which a rollout's pass is kept for the gradient.
    """

    estimate: Callable[[Lengths], int]
    prompt: Row
    completion: Row
    patch: Row
    copies: Literal["never", "windows", "always"]
    blocks: bool
    scores: tuple[int, int, int, int]
    stream: int
    recompute_above: int
    backward: float
    forward: tuple[float, float]
    frozen: int
    cast: tuple[int, int]
    cast_tables: bool
    head_copy: int
    head: tuple[float, float, int, int]
    head_late: int
    sums: int | None
    cache_sums: int
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
