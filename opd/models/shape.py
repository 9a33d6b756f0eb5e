"""Reads parts, layers and trained parameters of a model off the shapes of its parameters. No code
here depends on the family.

Legend: V vocabulary, D width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property
from math import prod

from opd.models.adapters import chosen_layers, part_of_model
from opd.planner import Config, Layer, LayerBytes, Rows, Shapes
from opd.types import ModelOptions

PARTS = {"vision": "vision tower", "projector": "projector", "language": "language", "head": "head"}
"""Titles of a model's parts, by the names that `part_of_model` returns. The language model includes
embeddings, and a head that is tied to them."""

LAYER = re.compile(r"^(.*\.(?:layers|blocks)\.\d+)\.(.*)$")
CACHED = re.compile(r"\.(k_proj|v_proj|in_proj_qkv|in_proj_a|in_proj_b|conv1d)\.weight$")
"""Names of a layer's parameters, and of the weights that compute keys, values and states."""

STATE = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
"""Settings whose product is the size of a recurrence's state."""


class Shape:
    """A model with a configuration and parameters of these shapes. `tower`, `text`: the layers of
    the vision tower and of the language model."""

    def __init__(self, config: Config, shapes: Shapes) -> None:
        self.config, self.shapes = config, shapes
        layers: dict[str, dict[str, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            if match := LAYER.match(name):
                layers.setdefault(match[1], {})[match[2]] = shape
        settings = config["text_config"]
        state = prod(settings.get(name, 0) for name in STATE)
        tower = [name for name in layers if "vis" in name]
        text = [name for name in layers if "vis" not in name]
        kinds = settings.get("layer_types") or [""] * len(text)
        windows = [settings["sliding_window"] if "sliding" in kind else None for kind in kinds]
        self.tower = [_layer(layers[name], 0, None) for name in tower]
        self.text = [
            _layer(layers[name], state, window) for name, window in zip(text, windows, strict=True)
        ]

    def layers(self, rows: Rows) -> list[Layer]:
        """The layers through which the rows run."""
        return self.tower if rows.kind == "patches" else self.text

    def held(self, microbatch: Iterable[Rows], layer_bytes: LayerBytes) -> float:
        """Bytes that the backward of a micro-batch holds."""
        kinds = [rows for rows in microbatch if rows.total]
        return sum(layer_bytes(layer, rows)[0] for rows in kinds for layer in self.layers(rows))

    def part(self, part: str) -> Shapes:
        """The shapes of a part's parameters; `part` is a key of PARTS."""
        return {name: size for name, size in self.shapes.items() if part_of_model(name) == part}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Number of parameters by the title of the part."""
        return {title: sum(map(prod, self.part(name).values())) for name, title in PARTS.items()}

    @cached_property
    def table(self) -> tuple[int, int]:
        """Shape [V, D] of the embedding and of the head."""
        text = self.config["text_config"]
        return text["vocab_size"], text["hidden_size"]

    @cached_property
    def products(self) -> int:
        """Weights by which a token is multiplied in all layers of the language model."""
        return sum(layer.products for layer in self.text)

    @cached_property
    def feature(self) -> int:
        """Bytes of a visual token's features in float32."""
        taps = self.config["vision_config"].get("deepstack_visual_indexes") or ()
        return 4 * self.table[1] * (1 + len(taps))

    def cache(self, tokens: int, item: int) -> int:
        """Bytes of one sequence in the cache of all layers: keys and values of `item` bytes for
        each of the `tokens`, and float32 states of recurrences."""
        return sum(2 * item * tokens * layer.key + 4 * layer.state for layer in self.text)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer but the head, by name."""
        return {
            name.removesuffix(".weight"): (size[0], size[1])
            for name, size in self.shapes.items()
            if len(size) == 2 and ".weight" in name
            if "embed" not in name and part_of_model(name) != "head"
        }

    def trained(self, options: ModelOptions) -> dict[str, int]:
        """Number of trained parameters by the title of the part; the adapter of a layer [out, in]
        has rank * (in + out). Raises RecipeError for a target that no layer has."""
        if options.adapters is None:
            frozen = () if options.tune_vision else (PARTS["vision"], PARTS["projector"])
            return {name: 0 if name in frozen else n for name, n in self.parameters.items()}
        counts = dict.fromkeys(PARTS.values(), 0)
        for name in chosen_layers(options.adapters, self.linears):
            counts[PARTS[part_of_model(name)]] += options.adapters.rank * sum(self.linears[name])
        return counts


def _layer(shapes: Shapes, state: int, window: int | None) -> Layer:
    """A layer with these parameters; `state` is the size of the state if it is a recurrence."""
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
        normalised=(query + key) * any("q_norm" in name for name in shapes),
        window=window,
        state=state * recurs,
        products=sum(weights.values()),
        cached=sum(count for name, count in weights.items() if CACHED.search(name)),
        last=wide[0] * (norms.count(width) <= 2),
    )
