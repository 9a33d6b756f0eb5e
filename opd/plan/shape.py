"""A model by the shapes of its parameters, and what of it is trained. Knows no family by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from opd.errors import ModelError
from opd.models.adapters import chosen_layers, part_of_model
from opd.models.consistency import check_sizes, complete
from opd.models.files import read_json
from opd.planner import Config, Layer, Shapes
from opd.prompts.families import family
from opd.types import ModelOptions

PARTS = {"vision": "vision tower", "projector": "projector", "language": "language", "head": "head"}
"""Parts of a model by `opd.models.adapters.part_of_model`; embeddings, and heads tied to them, are
language."""

LAYER = re.compile(r"^(.*\.(?:layers|blocks)\.\d+)\.(.*)$")
"""A layer's name, and that of one of its parameters."""

CACHED = re.compile(r"\.(k_proj|v_proj|in_proj_qkv|in_proj_a|in_proj_b|conv1d)\.weight$")
"""Names of weights that make what a layer's cache holds."""

STATE = ("num_value_heads", "key_head_dim", "value_head_dim")
"""What a recurrence's state is as large as the product of, in a configuration behind `linear_`."""


def read_config(folder: Path) -> dict[str, Any]:
    """A supported family's config.json with all defaults of transformers. Raises ModelError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no model folder")
    stated = read_json(file)
    check_sizes(file, stated)
    try:
        family(str(stated.get("model_type")))
    except ModelError as error:
        what = "of another model nothing can be planned, though torch may train it by rows"
        raise ModelError(f"{file}: {error}; {what}") from None
    return complete(file, stated)


@dataclass(frozen=True, eq=False)
class Shape:
    """A model's configuration and the shapes of its parameters. Legend: V vocabulary, D width."""

    config: Config
    shapes: Shapes

    @cached_property
    def parts(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """The shapes by part, a key of PARTS."""
        found: dict[str, dict[str, tuple[int, ...]]] = {name: {} for name in PARTS}
        for tensor, shape in self.shapes.items():
            found[part_of_model(tensor)][tensor] = shape
        return found

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by the title of a part."""
        return {PARTS[name]: sum(map(prod, its.values())) for name, its in self.parts.items()}

    @cached_property
    def table(self) -> tuple[int, int]:
        """The embedding, and a head: [V, D]."""
        text = self.config["text_config"]
        return text["vocab_size"], text["hidden_size"]

    @cached_property
    def layers(self) -> list[Layer]:
        """Layers of the language model."""
        text, found = self.config["text_config"], by_layer(self.parts["language"])
        state = prod(text.get(f"linear_{name}", 0) for name in STATE)
        kinds = text.get("layer_types") or [""] * len(found)
        windows = [text["sliding_window"] if "sliding" in kind else None for kind in kinds]
        return [layer_of(one, state, window) for one, window in zip(found, windows, strict=True)]

    @cached_property
    def tower(self) -> list[Layer]:
        """Layers of the vision tower."""
        return [layer_of(one) for one in by_layer(self.parts["vision"])]

    @cached_property
    def embedding(self) -> int:
        """Weights by which a patch is multiplied before the tower's layers. Frames of a still image
        are alike, so one stands for all that a kernel takes."""
        kernels = [size for size in self.parts["vision"].values() if len(size) > 3]
        return sum(prod(size) // (size[2] if len(size) == 5 else 1) for size in kernels)

    @cached_property
    def projector(self) -> int:
        """Weights by which a visual token is multiplied after the tower's layers."""
        return sum(prod(size) for size in self.parts["projector"].values() if len(size) == 2)

    @cached_property
    def products(self) -> int:
        """Weights by which a token is multiplied in all layers of the language model."""
        return sum(one.products for one in self.layers)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer by name, without heads."""
        matrices = {name: size for name, size in self.shapes.items() if len(size) == 2}
        return {
            name.removesuffix(".weight"): (size[0], size[1])
            for name, size in matrices.items()
            if ".weight" in name and "embed" not in name and part_of_model(name) != "head"
        }

    @cached_property
    def feature(self) -> int:
        """Bytes of a visual token's features in float32."""
        taps = self.config["vision_config"].get("deepstack_visual_indexes") or ()
        return 4 * self.table[1] * (1 + len(taps))

    def cache(self, tokens: int, item: int) -> int:
        """Bytes that all layers keep of a row of tokens: keys and values, and float32 states."""
        return sum(2 * item * tokens * one.key + 4 * one.state for one in self.layers)

    def adapters(self, options: ModelOptions) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear layers that get an adapter. Raises RecipeError for a target that
        no layer has."""
        names = chosen_layers(options.adapters, self.linears) if options.adapters else []
        return {name: self.linears[name] for name in names}

    def trained(self, options: ModelOptions) -> dict[str, int]:
        """Trained parameters by part; an adapter of [out, in] has rank * (in + out)."""
        if options.adapters is None:
            frozen = () if options.tune_vision else (PARTS["vision"], PARTS["projector"])
            return {name: 0 if name in frozen else n for name, n in self.parameters.items()}
        counts = dict.fromkeys(PARTS.values(), 0)
        for name, size in self.adapters(options).items():
            counts[PARTS[part_of_model(name)]] += options.adapters.rank * sum(size)
        return counts


def sees(options: ModelOptions) -> bool:
    """Whether image features change, so that they have a backward and cannot be kept."""
    adapters = options.adapters
    return options.tune_vision if adapters is None else adapters.vision or adapters.projector


def item_of(options: ModelOptions) -> int:
    """Bytes of a number in computation."""
    return 2 if options.dtype == "bfloat16" else 4


def by_layer(shapes: Shapes) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of each layer, by the parameters' names in it."""
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := LAYER.match(name):
            found.setdefault(match[1], {})[match[2]] = shape
    return list(found.values())


def layer_of(shapes: Shapes, state: int = 0, window: int | None = None) -> Layer:
    """A layer with these parameters; `state` is a recurrence's, where the layer has one."""
    weights = {name: prod(size) for name, size in shapes.items() if len(size) > 1}
    linears = {name.split(".")[-2]: size for name, size in shapes.items() if len(size) == 2}
    norms = [size[0] for name, size in shapes.items() if "norm" in name and name.endswith("weight")]
    width, recurs = max(norms), "in_proj_qkv" in linears
    wide = [count for name, count in weights.items() if name.startswith("mlp.")]
    mixed = [linears[name][1] for name in ("o_proj", "out_proj", "proj") if name in linears]
    query = 0 if recurs else mixed[0]
    key = linears["k_proj"][0] if "k_proj" in linears else query
    return Layer(
        width=width,
        norms=width * norms.count(width),
        wide=sum(wide[1:]) // width,
        query=query,
        key=key,
        gate=max(0, linears.get("q_proj", (0,))[0] - query),
        turned=(query + key) * any("q_norm" in name for name in shapes),
        window=window,
        state=state * recurs,
        products=sum(weights.values()),
        cached=sum(count for name, count in weights.items() if CACHED.search(name)),
        last=wide[0] * (norms.count(width) <= 2),
    )
