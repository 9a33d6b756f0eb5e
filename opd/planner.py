"""What a backend offers so that `opd plan` can estimate a run before any weights are there.

A backend knows the shapes of a model's parameters, roughly what its passes hold, and this machine's
device; `opd.plan` works out everything else. By the same figures a backend decides whether a
backward recomputes layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from opd.types import ModelOptions

Config: TypeAlias = Mapping[str, Any]
"""A config.json with all defaults of transformers."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of all parameters by Hugging Face name, in Hugging Face's layout, without a tied head."""


@dataclass(frozen=True)
class Layer:
    """A layer of a language model or of a vision tower, through which rows run: tokens or patches.
    The first five fields are numbers of one row."""

    width: int  # of the hidden state
    norms: int  # of all norms as wide as the hidden state
    outputs: int  # of the products that a backward reads
    query: int  # of all query heads; 0 for a recurrence
    key: int  # of all key heads
    turned: int  # of queries and keys if they are normalised
    window: int | None  # a row attends to this many rows before it; None: to all
    state: int  # numbers of a recurrence's state
    products: int  # weights by which a row is multiplied
    cached: int  # those that make what a cache holds
    last: int  # those of the last product, which no backward recomputes; 0 if a norm follows it


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-batch: `count` sequences of `length`, each of which attends to `before` rows
    of a prompt. Images of a prompt are as many sequences as a tower cuts them into."""

    kind: Literal["patches", "prompts", "completions"]
    count: int
    length: int
    before: int = 0

    @property
    def total(self) -> int:
        """All rows."""
        return self.count * self.length


LayerBytes: TypeAlias = Callable[[Layer, Rows], tuple[float, float]]
"""Bytes that a layer holds of rows for its backward, and bytes that come and go in the backward."""


@dataclass(frozen=True)
class Footprint:
    """What a backend holds of a step, in bytes; the core counts the rest exactly."""

    layer: LayerBytes
    margin: (
        float  # the bytes of all layers are taken as so many times larger, to be on the safe side
    )
    image_blocks: bool  # whether tokens of an image see each other
    stream: int  # of a number between two layers
    frozen: int  # of a frozen weight
    cast: int  # of a trained weight's copy for products
    keeps_casts: bool  # else they are freed while layers are recomputed
    head_copy: int  # of a weight of the head in a copy for products
    head: float  # arrays [rows, vocabulary] that are alive while logits are compared
    together: int  # of gradients that are computed together; 0: each is freed before the next


@dataclass(frozen=True)
class Machine:
    """This machine's device: `memory` bytes, of which a run may take the share `usable`.

    `product` gives a call that multiplies [rows, side] by [side, side] in a type of numbers and
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
        """Shapes of all parameters of a model without adapters. Raises ModelError."""

    def footprint(self, options: ModelOptions, config: Config, here: bool) -> Footprint:
        """What the backend holds of a step: on this machine if `here`, else on a GPU of the kind
        that the backend runs on."""

    def machine(self) -> Machine:
        """This machine's device. Raises BackendError where it has none."""
