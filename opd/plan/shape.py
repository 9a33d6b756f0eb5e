"""What of a model decides its cost: sizes from config.json, and the parameters that follow from them.

Legend: D hidden width, L layers, H query heads, G key-value heads, d head width, I feed-forward width, V vocabulary; a merged token is
the patches (merge x merge) that the language model sees as one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.errors import ModelError, nearest

PARTS = ("vision tower", "projector", "language", "head")
"""Where parameters are; the embedding belongs to the language, and so does a head that is tied to it."""

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a language layer, which adapters can be put on."""


@dataclass(frozen=True)
class Vision:
    """A vision tower: width, blocks, patches of an image, and what merges them into tokens; `positions` and `taps` of its own."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    patch: int
    frames: int
    channels: int
    merge: int
    positions: int
    taps: int

    @property
    def values(self) -> int:
        """Numbers of a patch."""
        return self.channels * self.frames * self.patch**2

    @property
    def merged(self) -> int:
        """Width of the patches of a merged token, side by side."""
        return self.hidden * self.merge**2

    @property
    def block(self) -> int:
        """Weights of a block's matrix products."""
        return self.hidden * (4 * self.hidden + 2 * self.intermediate)

    def merger(self, out: int) -> int:
        """Weights of the matrix products of all mergers: the last one, and one for each tap."""
        return (1 + self.taps) * self.merged * (self.merged + out)


@dataclass(frozen=True)
class Shape:
    """A vision-language model by its sizes."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    vision: Vision

    @property
    def query(self) -> int:
        """Width of all query heads, H * d."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of all key heads, G * d; values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def projections(self) -> dict[str, tuple[int, int]]:
        """Inputs and outputs of a layer's matrices."""
        sizes = (self.query, self.key, self.key, self.hidden, self.intermediate, self.intermediate, self.hidden)
        inputs = (self.hidden, self.hidden, self.hidden, self.query, self.hidden, self.hidden, self.intermediate)
        return dict(zip(PROJECTIONS, zip(inputs, sizes, strict=True), strict=True))

    @property
    def layer(self) -> int:
        """Weights of a layer's matrix products."""
        return sum(inputs * outputs for inputs, outputs in self.projections.values())

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> dict[str, int]:
        """Parameters by part."""
        v = self.vision
        # Two norms, with biases, and a bias for each of four matrices.
        block = v.block + 4 * v.hidden + 4 * v.hidden + v.intermediate + v.hidden
        tower = v.hidden * (v.values + 1) + v.positions * v.hidden + v.layers * block
        # The last merger normalises patches, those of taps normalise merged tokens.
        mergers = v.merger(self.hidden) + (1 + v.taps) * (v.merged + self.hidden) + 2 * v.hidden + v.taps * 2 * v.merged
        layers = self.layers * (self.layer + 2 * self.hidden + 2 * self.head_dim)
        language = self.embedding + layers + self.hidden
        return dict(zip(PARTS, (tower, mergers, language, 0 if self.tied else self.embedding), strict=True))


@dataclass(frozen=True)
class Tune:
    """What is trained: `kind` full (without tower and projector unless `vision`), lora or qlora.

    Adapters of `rank` stand on the language model's `targets`, and on tower and projector where `vision` and `projector` say so.
    """

    kind: str = "full"
    vision: bool = True
    projector: bool = False
    rank: int = 32
    targets: tuple[str, ...] = PROJECTIONS

    @property
    def full(self) -> bool:
        """Whether weights themselves are trained."""
        return self.kind == "full"

    @property
    def sees(self) -> bool:
        """Whether image features change, so that they have a backward and cannot be kept."""
        return self.vision or (self.projector and not self.full)

    def trained(self, shape: Shape) -> dict[str, int]:
        """Trained parameters by part; an adapter of a matrix [out, in] has rank * (in + out)."""
        if self.full:
            return {part: count * (self.vision or part in PARTS[2:]) for part, count in shape.parameters.items()}
        v = shape.vision
        widths = (
            self.vision * v.layers * (6 * v.hidden + 2 * (v.hidden + v.intermediate)),
            self.projector * (1 + v.taps) * (3 * v.merged + shape.hidden),
            shape.layers * sum(sum(size) for name, size in shape.projections.items() if name in self.targets),
            0,
        )
        return {part: self.rank * width for part, width in zip(PARTS, widths, strict=True)}


def read_shape(folder: Path) -> Shape:
    """The sizes in a folder's config.json; nothing else is read. Raises ModelError."""
    config = read_json(folder, "config.json")
    kind = str(config.get("model_type"))
    if kind not in READERS:
        raise ModelError(f"{folder / 'config.json'}: architecture '{kind}' cannot be planned; {nearest(kind, READERS)}")
    try:
        return READERS[kind](config)
    except KeyError as error:
        raise ModelError(f"{folder / 'config.json'}: no {error.args[0]}, which the cost of a {kind} depends on") from error


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """A JSON object of a model folder. Raises ModelError."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{folder}: no {name}, so this is no model folder") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / name}: cannot be read as JSON ({error})") from error
    if not isinstance(found, dict):
        raise ModelError(f"{folder / name}: holds no JSON object")
    return found


def _qwen3_vl(config: Mapping[str, Any]) -> Shape:
    text, vision = config["text_config"], config["vision_config"]
    heads = text["num_attention_heads"]
    return Shape(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision=Vision(
            hidden=vision["hidden_size"],
            layers=vision["depth"],
            heads=vision["num_heads"],
            intermediate=vision["intermediate_size"],
            patch=vision["patch_size"],
            frames=vision["temporal_patch_size"],
            channels=vision.get("in_channels", 3),
            merge=vision["spatial_merge_size"],
            positions=vision["num_position_embeddings"],
            taps=len(vision["deepstack_visual_indexes"]),
        ),
    )


READERS: dict[str, Callable[[Mapping[str, Any]], Shape]] = {"qwen3_vl": _qwen3_vl}
"""How each `model_type` names its sizes."""
