"""A backend's part of `opd plan`, which estimates a run before weights are downloaded.

The backend names the shapes of a model's parameters, estimates the bytes that its passes hold, and
describes this machine's device; `opd.plan` computes everything else. The backend also uses the
estimate to decide whether a backward recomputes layers.
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
    The first six fields count the numbers of one row."""

    width: int  # the hidden state
    norms: int  # outputs of all norms that are as wide as the hidden state
    outputs: int  # outputs of products that the backward reads
    query: int  # all query heads; 0 for a recurrence
    key: int  # all key heads
    normalised: int  # queries and keys if they have norms, else 0
    window: int | None  # a row attends to this many rows before it; None: to all
    state: int  # numbers of a recurrence's state
    products: int  # weights by which a row is multiplied
    cached: int  # the weights among them that compute keys, values and states
    last: int  # the weights of the last product, which is not recomputed; 0 if a norm follows it


@dataclass(frozen=True)
class Rows:
    """Rows of a micro-batch: `count` sequences of `length` rows; each sequence also attends to
    `before` rows of a prompt. An image is one sequence for each piece that the tower sees."""

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
    """A backend's estimate of the bytes of a step; `opd.plan` counts the rest exactly."""

    layer: LayerBytes
    margin: float  # the rule for recomputation multiplies the bytes of all layers by this
    image_blocks: bool  # whether tokens of an image see each other
    stream: int  # bytes of a number between two layers
    frozen: int  # bytes of a frozen weight
    cast: int  # bytes of a trained weight's copy for products
    keeps_casts: bool  # False: those copies are freed while layers are recomputed
    head_copy: int  # bytes of a head weight's copy for products
    head: float  # arrays [rows, vocabulary] that are alive while logits are compared
    together: int  # bytes of gradients that are computed together; 0: each is freed before the next


@dataclass(frozen=True)
class Machine:
    """This machine's device: `memory` bytes, of which a run may take the share `usable`."""

    name: str
    memory: float
    usable: float
    gpu: bool
    product: Callable[[int, int, str], Callable[[], object]]
    """(rows, side, dtype) -> a function that multiplies [rows, side] by [side, side] and waits."""
    resident: bool = False  # whether the backend's `peak_memory` counts all bytes of the process


class Planner(Protocol):
    """The methods of a backend that `opd plan` calls; none of them reads weights."""

    def parameters(self, config: Config) -> Shapes:
        """Shapes of all parameters of a model without adapters. Raises ModelError."""

    def footprint(self, options: ModelOptions, config: Config, here: bool) -> Footprint:
        """The estimate for this machine if `here`, else for a GPU of the backend's kind."""

    def machine(self) -> Machine:
        """This machine's device. Raises BackendError if the backend has no device here."""
