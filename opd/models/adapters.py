"""Low-rank adapters (LoRA, arXiv 2106.09685): the layers that get one, and initial values.

A linear layer W [out, in] becomes W + scale * B A with A [r, in], B [out, r] and scale = alpha / r.
Tensors are named `<layer>.lora_A.weight` and `<layer>.lora_B.weight`, with the Hugging Face name of
the layer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from opd import randomness
from opd.errors import ModelError, RecipeError, nearest
from opd.types import AdapterOptions, FloatArray

A, B = ".lora_A.weight", ".lora_B.weight"

PARTS = {
    "projector": (".merger.", ".deepstack_merger_list.", ".multi_modal_projector.", ".connector."),
    "vision": (".visual.", ".vision_tower.", ".vision_model."),
    "language": (".language_model.", ".text_model."),
}
"""Parts of a model, and the texts of which one occurs in the names of the part's layers; the first
part that matches applies. The head matches none."""

Tensors: TypeAlias = dict[str, FloatArray]


@dataclass(frozen=True)
class Adapter:
    """An adapter: `rank` >= 1, `alpha` (not 0), and `tensors` float32 by name, without PREFIX."""

    rank: int
    alpha: float
    tensors: Mapping[str, FloatArray]


def part_of_model(layer: str) -> Literal["language", "vision", "projector", "head"]:
    """The part of the model that `layer`, a Hugging Face name, belongs to."""
    for name, marks in PARTS.items():
        if any(mark in f".{layer}." for mark in marks):
            return name  # type: ignore[return-value]
    return "head"


def fresh_adapters(options: AdapterOptions, layers: Mapping[str, tuple[int, int]]) -> Tensors:
    """New adapters: A is uniform in +-1/sqrt(in) as in PEFT, drawn from the seed and the tensor's
    name; B is zero, so that the model computes the same at first."""
    tensors: Tensors = {}
    for name in chosen_layers(options, layers):
        out, width = layers[name]
        place = np.frombuffer(hashlib.sha256(f"{name}{A}".encode()).digest()[:24], np.uint64)
        drawn = randomness.generator(options.seed, randomness.Purpose.ADAPTER, *place).random(
            (options.rank, width), np.float32
        )
        tensors[f"{name}{A}"] = (2 * drawn - 1) / np.float32(np.sqrt(width))
        tensors[f"{name}{B}"] = np.zeros((out, options.rank), np.float32)
    return tensors


def chosen_layers(options: AdapterOptions, layers: Mapping[str, tuple[int, int]]) -> list[str]:
    """Names of the layers that get an adapter. Raises RecipeError as `check_targets` does."""
    language = {
        name: name.rpartition(".")[2] for name in layers if part_of_model(name) == "language"
    }
    check_targets(options.targets, set(language.values()))
    wanted = {"vision": options.vision, "projector": options.projector}
    chosen = {
        name for name, word in language.items() if not options.targets or word in options.targets
    }
    return [name for name in layers if wanted.get(part_of_model(name)) or name in chosen]


def check_targets(targets: Iterable[str], known: Collection[str]) -> None:
    """Raises RecipeError for a target that is not in `known`, the last words of the names of the
    language model's linear layers."""
    for target in targets:
        if target not in known:
            raise RecipeError(
                f"model.targets: the language model has no linear layer '{target}';"
                f" {nearest(target, known)}"
            )


def check_fits(
    tensors: Mapping[str, FloatArray], layers: Mapping[str, tuple[int, int]], folder: Path
) -> None:
    """Raises ModelError if the `tensors` of the adapter in `folder` do not fit `layers`, (out, in)
    by name."""
    for name in adapted_layers(tensors):
        if name == "lm_head":
            raise ModelError(
                f"{folder}: this adapter changes the head, lm_head; adapters on heads are not"
                " supported"
            )
        if name not in layers:
            near = nearest(name, layers)
            hint = f"; {near}" if near.startswith("did you mean") else ""
            raise ModelError(
                f"{folder}: this adapter is of another model: the model has no linear layer"
                f" {name}{hint}"
            )
        out, width = layers[name]
        a, b = tensors[f"{name}{A}"].shape, tensors[f"{name}{B}"].shape
        if (b[0], a[1]) != (out, width):
            raise ModelError(
                f"{folder}: this adapter is of another model: {name} is [{out}, {width}] there and"
                f" [{b[0]}, {a[1]}] here"
            )


def adapted_layers(tensors: Mapping[str, Any]) -> list[str]:
    """Names of the layers whose adapters are in `tensors`."""
    return [name.removesuffix(A) for name in tensors if name.endswith(A)]


def merged_updates(
    tensors: Mapping[str, FloatArray], scale: float
) -> Iterator[tuple[str, FloatArray]]:
    """Yields the weight's name and the update scale * B A [out, in], float32, of every layer with
    an adapter."""
    for name in adapted_layers(tensors):
        yield f"{name}.weight", np.float32(scale) * (tensors[f"{name}{B}"] @ tensors[f"{name}{A}"])
