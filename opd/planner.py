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


@dataclass(frozen=True)
class Layer:
    """A layer of a language model or of a vision tower.

    Numbers of a row: of the hidden `width`; of all `norms` of that width; of what the `wide`
    products of the feed-forward give; of all `query` and `key` heads; of a `gate` on heads; and of
    heads that are `turned`: normalised, or rotated out of one product of queries, keys and values.
    `window`: rows back to which it attends; None: all. `state`: numbers of a recurrence's state.
    `products`: weights by which a row is multiplied; `cached`: those that make what a cache holds;
    `last`: those of the last product, which no backward computes again; 0 where a norm follows it.
    """

    width: int
    norms: int
    wide: int
    query: int
    key: int
    gate: int
    turned: int
    window: int | None
    state: int
    products: int
    cached: int
    last: int


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-batch: `count` sequences of `length`, each of which attends to `before` rows
    of a prompt."""

    kind: Literal["patches", "prompts", "completions"]
    count: int
    length: int
    before: int = 0

    @property
    def total(self) -> int:
        """All rows."""
        return self.count * self.length


class Lengths(NamedTuple):
    """All rows of a micro-batch. Images of a prompt are as many sequences as a tower cuts them
    into."""

    patches: Rows
    prompts: Rows
    completions: Rows


@dataclass(frozen=True)
class Footprint:
    """What a backend holds of a step, in bytes; the core counts the rest exactly.

    `estimate`: what the backend takes activations to be; above `recompute_above` layers run again,
    and numbers between layers, of `stream` bytes, are all that is held. `layer`: what a layer holds
    of rows for its backward, and what passes by in that. `blocks`: whether tokens of an image see
    each other. `frozen`: of a frozen weight; `cast`: of a trained weight in the copy that products
    take, which is freed while layers run again unless `keeps_casts`. `chunk`: of a float32 array
    [rows, V] in the head stage, at most; `head`: how many there are, and how many beside a head's
    gradient; `head_copy`: of a head's weight in a copy for it. `sums`: of gradients that are added
    up at a time, beside one parameter's; 0 where each is freed before. `cache_sums`: of a number
    in sums of gradients to prompts' keys and values that are there before completions run; 0 where
    gradients come later. `apply`: beside the gradient in the optimizer's step, at most.
    `keeps_tokens`: tokens of prompts up to which a rollout's pass is kept for the gradient.
    """

    estimate: Callable[[Lengths], int]
    layer: Callable[[Layer, Rows], tuple[float, float]]
    blocks: bool
    stream: int
    recompute_above: int
    frozen: int
    cast: int
    keeps_casts: bool
    chunk: int
    head: tuple[float, float]
    head_copy: int
    sums: int
    cache_sums: int
    apply: int
    keeps_tokens: int


@dataclass(frozen=True)
class Machine:
    """This machine's device: `memory` bytes, of which a run may take the share `usable`.

    `product` gives a call that multiplies [rows, side] by [side, side] in a type of numbers, and
    waits for the result; where `packed`, also in "packed" and "packed back": by weights in 4 bits,
    and by their transpose. `resident`: the backend's `peak_memory` counts all bytes of the process.
    """

    name: str
    memory: float
    usable: float
    gpu: bool
    product: Callable[[int, int, str], Callable[[], object]]
    packed: bool = False
    resident: bool = False


class Planner(Protocol):
    """What `opd plan` asks of a backend; nothing here reads weights."""

    def parameters(self, config: Config) -> Shapes:
        """Names and shapes of all parameters of a model without adapters. Raises ModelError."""

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, here: bool
    ) -> Footprint:
        """What the backend holds of a step. `largest`: numbers of the largest parameter. `here`: on
        this machine, else on a GPU of the kind that the backend runs on."""

    def machine(self) -> Machine:
        """This machine's device. Raises BackendError where it has none."""
