"""A model by the shapes of its parameters, and what of it is trained. Knows no family by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from math import prod
from operator import mul
from pathlib import Path
from typing import Any

from opd.errors import ModelError
from opd.models.adapters import check_targets, part_of_model
from opd.models.consistency import check_sizes, complete
from opd.models.files import read_json
from opd.planner import Config, Row, Shapes
from opd.prompts.families import family
from opd.types import ModelOptions

PARTS = {"vision": "vision tower", "projector": "projector", "language": "language", "head": "head"}
"""Parts of a model by `opd.models.adapters.part_of_model`; embeddings, and heads tied to them, are
language."""

LAYER = re.compile(r"^(.*\.(?:layers|blocks)\.\d+)\.(.*)$")
"""A layer's name, and that of one of its parameters."""


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


class Layer:
    """A layer of a language model or of a vision tower, by its parameters' shapes.

    Numbers of a row: as `opd.planner.Row` has them; `last`: of the weights of its last product, 0
    where a norm follows.
    """

    def __init__(self, shapes: Shapes) -> None:
        """`shapes` by the parameters' names in the layer."""
        norms = [s[0] for name, s in shapes.items() if "norm" in name and name.endswith("weight")]
        sizes = {name.split(".")[-2]: size for name, size in shapes.items() if len(size) == 2}
        fed = [prod(s) for name, s in shapes.items() if name.startswith("mlp.") and len(s) == 2]
        self.linears = sizes
        self.width = max(norms)
        self.norms = self.width * norms.count(self.width)
        self.wide = sum(fed[1:]) // self.width
        self.last = fed[0] * (self.norms <= 2 * self.width)
        self.recurs = "in_proj_qkv" in sizes
        mixed = next(sizes[word][1] for word in ("o_proj", "out_proj", "proj") if word in sizes)
        self.query = 0 if self.recurs else mixed
        self.key = sizes.get("k_proj", (self.query, 0))[0]
        self.gate = max(0, sizes.get("q_proj", (0, 0))[0] - self.query)
        normed = any(name.endswith("q_norm.weight") for name in shapes)
        self.turned = 2 * self.width if "qkv" in sizes else (self.query + self.key) * normed

    def held(self, row: Row) -> float:
        """Bytes of a row in the layer's backward."""
        sizes = self.width, self.norms, self.wide, self.query, self.key, self.turned, self.gate
        return float(sum(map(mul, row, sizes)) + row.recurrence * self.recurs)


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
    def layers(self) -> list[Layer]:
        """Layers of the language model."""
        return _layers(self.parts["language"])

    @cached_property
    def tower(self) -> list[Layer]:
        """Layers of the vision tower."""
        return _layers(self.parts["vision"])

    @cached_property
    def table(self) -> tuple[int, int]:
        """The embedding, and a head: [V, D]."""
        text = self.config["text_config"]
        return text["vocab_size"], text["hidden_size"]

    @cached_property
    def linears(self) -> dict[str, tuple[int, ...]]:
        """[out, in] of every linear layer by name, without heads."""
        names = (
            name for name, size in self.shapes.items() if len(size) == 2 and "embed" not in name
        )
        found = {
            name.removesuffix(".weight"): self.shapes[name] for name in names if ".weight" in name
        }
        return {name: size for name, size in found.items() if part_of_model(name) != "head"}

    @cached_property
    def products(self) -> dict[str, int]:
        """Weights of each part by which every row of it is multiplied.

        Frames of a still image are alike, so one stands for all that a kernel takes.
        """

        def weights(name: str, size: tuple[int, ...]) -> int:
            table = len(size) == 2 and "embed" in name
            return 0 if len(size) < 2 or table else prod(size) // (size[2] if len(size) == 5 else 1)

        return {part: sum(weights(*one) for one in its.items()) for part, its in self.parts.items()}

    @cached_property
    def unhanded(self) -> int:
        """Weights of the last layer that a prompt does not need: its rows go nowhere after it."""
        handed = ("k_proj", "v_proj", "in_proj_qkv", "in_proj_a", "in_proj_b")
        last = self.layers[-1].linears
        return sum(prod(size) for word, size in last.items() if word not in handed)

    @cached_property
    def windows(self) -> list[int | None]:
        """Tokens back to which each layer attends; None: all."""
        text = self.config["text_config"]
        kinds = text.get("layer_types") or [""] * len(self.layers)
        return [text["sliding_window"] if "sliding" in kind else None for kind in kinds]

    @cached_property
    def tower_heads(self) -> int:
        """Heads of a layer of the tower."""
        vision = self.config["vision_config"]
        return int(vision.get("num_heads") or vision["num_attention_heads"])

    @cached_property
    def states(self) -> int:
        """Numbers of the states of all layers with a recurrence."""
        names = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
        sizes: list[int] = [self.config["text_config"].get(name, 0) for name in names]
        return prod(sizes) * sum(layer.recurs for layer in self.layers)

    def cache(self, tokens: int, item: int) -> int:
        """Bytes that all layers keep of a row of tokens: keys and values, and float32 states."""
        return item * 2 * tokens * sum(layer.key for layer in self.layers) + 4 * self.states

    @cached_property
    def feature(self) -> int:
        """Bytes of a visual token's features in float32."""
        taps = self.config["vision_config"].get("deepstack_visual_indexes") or ()
        return 4 * self.table[1] * (1 + len(taps))

    def check(self, options: ModelOptions) -> None:
        """Raises RecipeError for a target of adapters that no layer has."""
        if options.adapters and not options.adapter:
            names = {
                name.rpartition(".")[2]
                for name in self.linears
                if part_of_model(name) == "language"
            }
            check_targets(options.adapters.targets, names)

    def trained(self, options: ModelOptions) -> dict[str, int]:
        """Trained parameters by part; an adapter of [out, in] has rank * (in + out)."""
        adapters = options.adapters
        if adapters is None:
            frozen = () if options.tune_vision else (PARTS["vision"], PARTS["projector"])
            return {name: 0 if name in frozen else n for name, n in self.parameters.items()}
        counts = dict.fromkeys(PARTS.values(), 0)
        for name, size in self._adapted(options).items():
            counts[PARTS[part_of_model(name)]] += adapters.rank * sum(size)
        return counts

    def _adapted(self, options: ModelOptions) -> Shapes:
        """Linear layers with an adapter."""
        adapters = options.adapters
        assert adapters is not None
        every, beside = (
            not adapters.targets,
            {"vision": adapters.vision, "projector": adapters.projector},
        )
        return {
            name: size
            for name, size in self.linears.items()
            if beside.get(part_of_model(name), every or name.rpartition(".")[2] in adapters.targets)
        }

    def narrow(self, options: ModelOptions) -> float:
        """Numbers of a token's rows inside all adapters of a language layer, on average."""
        if options.adapters is None:
            return 0.0
        many = sum(part_of_model(name) == "language" for name in self._adapted(options))
        return options.adapters.rank * many / len(self.layers)

    def sums(self, options: ModelOptions, most: int | None) -> int:
        """Bytes of a layer's gradients that are added to their sums at a time: `most` and one
        parameter's, or None, one parameter's."""
        if options.adapters is None:
            sizes = [[4 * prod(size) for size in one.linears.values()] for one in self.layers]
        else:
            rank, names = options.adapters.rank, options.adapters.targets
            sizes = [
                [4 * rank * sum(s) for word, s in one.linears.items() if not names or word in names]
                for one in self.layers
            ]
        return max(min(sum(each), (most or 0) + max(each, default=0)) for each in sizes)


def sees(options: ModelOptions) -> bool:
    """Whether image features change, so that they have a backward and cannot be kept."""
    adapters = options.adapters
    return options.tune_vision if adapters is None else adapters.vision or adapters.projector


def item_of(options: ModelOptions) -> int:
    """Bytes of a number in computation."""
    return 2 if options.dtype == "bfloat16" else 4


def _layers(shapes: Shapes) -> list[Layer]:
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := LAYER.match(name):
            found.setdefault(match[1], {})[match[2]] = shape
    return [Layer(inner) for inner in found.values()]
