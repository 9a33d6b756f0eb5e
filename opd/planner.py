"""What a backend may offer, so that `opd plan` can estimate a run before any weights are there.

A backend knows the shapes of a model's parameters, roughly what its forward and backward hold, and
this machine's device. Everything else of a plan is worked out in `opd.plan`. A backend decides by
the same figures whether to recompute layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, TypeAlias

from opd.types import ModelOptions

Config: TypeAlias = Mapping[str, Any]
"""A config.json with all defaults of transformers."""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of all parameters by Hugging Face name, in Hugging Face's layout, without a tied head."""

LAYER = re.compile(r"^(.*\.(?:layers|blocks)\.\d+)\.(.*)$")
CACHED = re.compile(r"\.(k_proj|v_proj|in_proj_qkv|in_proj_a|in_proj_b|conv1d)\.weight$")
"""Names of a layer's parameters, and of weights that make what its cache holds."""

STATE = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
"""Settings whose product is the size of a recurrence's state."""


@dataclass(frozen=True)
class Layer:
    """A layer of a language model or of a vision tower.

    Numbers of a row: of the hidden `width`, of all `norms` of that width, of the `outputs` of
    products that a backward reads, of all `query` and `key` heads, and of those that are `turned`
    (normalised). `window`: rows back to which it attends; None: all. `state`: numbers of a
    recurrence's state. `products`: all weights by which a row is multiplied; `cached`: those that
    make what a cache holds; `last`: those of the last product, which no backward computes again; 0
    where a norm follows it.
    """

    width: int
    norms: int
    outputs: int
    query: int
    key: int
    turned: int
    window: int | None
    state: int
    products: int
    cached: int
    last: int


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


class Layers:
    """The layers of a model: of its vision `tower`, and of its language model (`text`)."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        found: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            if match := LAYER.match(name):
                found.setdefault(match[1], {})[match[2]] = shape
        settings = config["text_config"]
        state = prod(settings.get(name, 0) for name in STATE)
        tower, text = ([name for name in found if ("vis" in name) != of] for of in (False, True))
        kinds = settings.get("layer_types") or [""] * len(text)
        windows = [settings["sliding_window"] if "sliding" in kind else None for kind in kinds]
        each = zip(text, windows, strict=True)
        self.tower = [_layer(found[name], 0, None) for name in tower]
        self.text = [_layer(found[name], state, window) for name, window in each]

    def of(self, rows: Rows) -> list[Layer]:
        """The layers through which the rows run."""
        return self.tower if rows.kind == "patches" else self.text

    def held(self, every: Iterable[Rows], layer: LayerBytes) -> float:
        """Bytes that the backward of all rows holds."""
        some = [rows for rows in every if rows.total]
        return sum(layer(one, rows)[0] for rows in some for one in self.of(rows))


def _layer(shapes: Shapes, state: int, window: int | None) -> Layer:
    weights = {name: prod(size) for name, size in shapes.items() if len(size) > 1}
    linears = {name.split(".")[-2]: size for name, size in shapes.items() if len(size) == 2}
    norms = [size[0] for name, size in shapes.items() if "norm" in name and name.endswith("weight")]
    width, recurs = max(norms), "in_proj_qkv" in linears
    wide = [count for name, count in weights.items() if name.startswith("mlp.")]
    mixed = next(linears[name][1] for name in ("o_proj", "out_proj", "proj") if name in linears)
    query = 0 if recurs else mixed
    key = linears["k_proj"][0] if "k_proj" in linears else query
    gate = max(0, linears["q_proj"][0] - query) if "q_proj" in linears else 0
    return Layer(
        width=width,
        norms=width * norms.count(width),
        outputs=sum(wide[1:]) // width + query + key + gate,
        query=query,
        key=key,
        turned=(query + key) * any("q_norm" in name for name in shapes),
        window=window,
        state=state * recurs,
        products=sum(weights.values()),
        cached=sum(count for name, count in weights.items() if CACHED.search(name)),
        last=wide[0] * (norms.count(width) <= 2),
    )


LayerBytes: TypeAlias = Callable[[Layer, Rows], tuple[float, float]]
"""Bytes that a layer holds of rows for its backward, and what passes by in that."""


@dataclass(frozen=True)
class Footprint:
    """What a backend holds of a step, in bytes; the core counts the rest exactly.

    Where all layers hold more than `recompute_above`, times a `margin` since too late may not fit,
    each runs again, and numbers between layers, of `stream` bytes, are all that is held. `blocks`:
    whether tokens of an image see each other. `frozen`: of a frozen weight; `cast`: of a trained
    weight's copy for products, freed while layers run again unless `keeps_casts`. `chunk`: of a
    float32 array [rows, vocabulary] in the head stage, at most; `head`: how many there are, and how
    many beside a head's gradient; `head_copy`: of a head's weight in a copy for it. `sums`: of
    gradients that are added up at a time, beside one parameter's; 0 where each is freed before.
    `cache_sums`: of a number in sums of gradients to prompts' keys and values before completions
    run; 0 where they come later. `apply`: beside the gradient in the optimizer's step, at most.
    `keeps_tokens`: tokens of prompts up to which a rollout's pass is kept for the gradient.
    """

    layer: LayerBytes
    margin: float
    recompute_above: int
    stream: int
    blocks: bool
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
        """Shapes of all parameters of a model without adapters. Raises ModelError."""

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, here: bool
    ) -> Footprint:
        """What the backend holds of a step. `largest`: numbers of the largest parameter. `here`: on
        this machine, else on a GPU of the kind that the backend runs on."""

    def machine(self) -> Machine:
        """This machine's device. Raises BackendError where it has none."""
