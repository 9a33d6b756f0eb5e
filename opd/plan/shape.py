"""A model by the shapes of its parameters, and what of it is trained. Knows no family by name."""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from opd.errors import ModelError
from opd.models.adapters import chosen_layers, part_of_model
from opd.models.consistency import check_sizes, complete
from opd.models.files import read_json
from opd.planner import Layers, Shapes
from opd.prompts.families import family
from opd.types import ModelOptions

PARTS = {"vision": "vision tower", "projector": "projector", "language": "language", "head": "head"}
"""Parts of a model by `opd.models.adapters.part_of_model`; embeddings, and heads tied to them, are
language."""


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


class Shape(Layers):
    """A model's configuration and the shapes of its parameters. Legend: V vocabulary, D width."""

    def part(self, part: str) -> Shapes:
        """The shapes of a part, a key of PARTS."""
        return {name: size for name, size in self.shapes.items() if part_of_model(name) == part}

    @cached_property
    def parameters(self) -> dict[str, int]:
        """Parameters by the title of a part."""
        return {title: sum(map(prod, self.part(name).values())) for name, title in PARTS.items()}

    @cached_property
    def table(self) -> tuple[int, int]:
        """The embedding, and a head: [V, D]."""
        text = self.config["text_config"]
        return text["vocab_size"], text["hidden_size"]

    @cached_property
    def products(self) -> int:
        """Weights by which a token is multiplied in all layers of the language model."""
        return sum(one.products for one in self.text)

    @cached_property
    def embedding(self) -> int:
        """Weights by which a patch is multiplied before the tower's layers. Frames of a still image
        are alike, so one stands for all that a kernel takes."""
        kernels = [size for size in self.part("vision").values() if len(size) > 3]
        return sum(prod(size) // (size[2] if len(size) == 5 else 1) for size in kernels)

    @cached_property
    def projector(self) -> int:
        """Weights by which a visual token is multiplied after the tower's layers."""
        return sum(prod(size) for size in self.part("projector").values() if len(size) == 2)

    @cached_property
    def feature(self) -> int:
        """Bytes of a visual token's features in float32."""
        taps = self.config["vision_config"].get("deepstack_visual_indexes") or ()
        return 4 * self.table[1] * (1 + len(taps))

    def cache(self, tokens: int, item: int) -> int:
        """Bytes that all layers keep of a row of tokens: keys and values, and float32 states."""
        return sum(2 * item * tokens * one.key + 4 * one.state for one in self.text)

    @cached_property
    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear layer by name, without heads."""
        return {
            name.removesuffix(".weight"): (size[0], size[1])
            for name, size in self.shapes.items()
            if len(size) == 2 and ".weight" in name
            if "embed" not in name and part_of_model(name) != "head"
        }

    def trained(self, options: ModelOptions) -> dict[str, int]:
        """Trained parameters by part; an adapter of [out, in] has rank * (in + out).

        Raises RecipeError for a target that no layer has.
        """
        if options.adapters is None:
            frozen = () if options.tune_vision else (PARTS["vision"], PARTS["projector"])
            return {name: 0 if name in frozen else n for name, n in self.parameters.items()}
        counts = dict.fromkeys(PARTS.values(), 0)
        for name in chosen_layers(options.adapters, self.linears):
            counts[PARTS[part_of_model(name)]] += options.adapters.rank * sum(self.linears[name])
        return counts


def sees(options: ModelOptions) -> bool:
    """Whether image features change, so that they have a backward and cannot be kept."""
    adapters = options.adapters
    return options.tune_vision if adapters is None else adapters.vision or adapters.projector


def item_of(options: ModelOptions) -> int:
    """Bytes of a number in computation."""
    return 2 if options.dtype == "bfloat16" else 4
