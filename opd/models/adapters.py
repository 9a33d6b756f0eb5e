"""Low-rank adapters (LoRA, arXiv 2106.09685): where they go, what they start from, and their files
in PEFT's format.

A linear layer W [out, in] becomes W + scale * B A with A [r, in], B [out, r] and scale = alpha / r.
Tensors are named after the layer, as Hugging Face names it: `<layer>.lora_A.weight` and
`<layer>.lora_B.weight`; PEFT's files put PREFIX before these names.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
from safetensors import SafetensorError, deserialize

from opd import paths, randomness
from opd.errors import ModelError, RecipeError, nearest, shown
from opd.models import hub, names
from opd.models.files import INDEX, SINGLE, check_links, read_json
from opd.types import AdapterOptions, FloatArray, ModelOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
A, B = ".lora_A.weight", ".lora_B.weight"

PARTS = {
    "projector": (".merger.", ".deepstack_merger_list.", ".multi_modal_projector.", ".connector."),
    "vision": (".visual.", ".vision_tower.", ".vision_model."),
    "language": (".language_model.", ".text_model."),
}
"""What a layer's name holds, by the part of a model that it belongs to; the first that fits. The
head belongs to none."""

PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""Settings of PEFT that change what an adapter computes, at the values that this product
computes."""

READ = ("peft_type", "r", "lora_alpha", "base_model_name_or_path", "revision", "init_lora_weights")
"""Settings of PEFT that are read here."""

SAME_FUNCTION = (
    *(
        "task_type",
        "auto_mapping",
        "peft_version",
        "inference_mode",
        "runtime_config",
        "lora_dropout",
    ),
    # Which layers have an adapter, which the tensors themselves say.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    # Read only while an adapter begins, by a kind of `init_lora_weights`, or under a setting that
    # is refused.
    *(
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "megatron_core",
        "qalora_group_size",
        "ensure_weight_tying",
    ),
)
"""Settings of PEFT that do not change what an adapter computes over the base, whatever they are."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Kinds of `init_lora_weights` that leave the base as it is; the others take a part out of the
base's weights."""

Tensors: TypeAlias = dict[str, FloatArray]


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read: `tensors` by name, float32."""

    rank: int
    alpha: float
    tensors: Mapping[str, FloatArray]


def part_of_model(layer: str) -> Literal["language", "vision", "projector", "head"]:
    """The part of the model that a layer belongs to, by its Hugging Face name."""
    for name, marks in PARTS.items():
        if any(mark in f".{layer}." for mark in marks):
            return name  # type: ignore[return-value]
    return "head"


def initial_adapters(options: ModelOptions, layers: Mapping[str, tuple[int, int]]) -> Tensors:
    """What the adapters of student and teacher start from: those of `options.adapter`, else fresh
    ones.

    `layers`: (out, in) of every linear layer of the model, by Hugging Face name. Raises RecipeError
    for a target that no layer has, and ModelError where `options.adapter` does not fit the model.
    """
    assert options.adapters is not None
    if options.adapter is None:
        return _fresh(options.adapters, layers)
    return dict(fitting(options, layers).tensors)


def _fresh(options: AdapterOptions, layers: Mapping[str, tuple[int, int]]) -> Tensors:
    """A uniform in +-1/sqrt(in), as PEFT draws it, from the seed and the tensor's name; B zero, so
    that nothing changes at first."""
    tensors: Tensors = {}
    for name in _chosen(options, layers):
        out, width = layers[name]
        place = np.frombuffer(hashlib.sha256(f"{name}{A}".encode()).digest()[:24], np.uint64)
        drawn = randomness.generator(options.seed, randomness.Purpose.ADAPTER, *place).random(
            (options.rank, width), np.float32
        )
        tensors[f"{name}{A}"] = (2 * drawn - 1) / np.float32(np.sqrt(width))
        tensors[f"{name}{B}"] = np.zeros((out, options.rank), np.float32)
    return tensors


def _chosen(options: AdapterOptions, layers: Mapping[str, tuple[int, int]]) -> list[str]:
    """The layers that get an adapter."""
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
    """Raises RecipeError for a target that is none of the `known` last words of the language
    model's linear layers."""
    for target in targets:
        if target not in known:
            raise RecipeError(
                f"model.targets: the language model has no linear layer '{target}';"
                f" {nearest(target, known)}"
            )


def check_fits(
    tensors: Mapping[str, FloatArray], layers: Mapping[str, tuple[int, int]], folder: Path
) -> None:
    """Raises ModelError where an adapter's tensors do not fit the model's layers."""
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
    """The layers that have an adapter among `tensors`."""
    return [name.removesuffix(A) for name in tensors if name.endswith(A)]


def merged_updates(
    tensors: Mapping[str, FloatArray], scale: float
) -> Iterator[tuple[str, FloatArray]]:
    """The weight's name and scale * B A [out, in], float32, of every layer that has an adapter."""
    for name in adapted_layers(tensors):
        yield f"{name}.weight", np.float32(scale) * (tensors[f"{name}{B}"] @ tensors[f"{name}{A}"])


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format, and no model beside it; a model's
    config.json alone is none."""
    is_model = (folder / "config.json").is_file()
    return (folder / CONFIG).is_file() and not (
        is_model and (_has_weights(folder) or not (folder / WEIGHTS).is_file())
    )


def check_alone(folder: Path) -> None:
    """Raises ModelError where a folder holds both a model and an adapter: transformers would load
    the adapter over its own base."""
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() and _has_weights(folder):
        raise ModelError(
            f"{folder} holds a model and an adapter; put {CONFIG} and {WEIGHTS} into a folder of"
            " their own"
        )


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def base_model(folder: Path) -> str:
    """The model that an adapter was trained on, as its file names it. Raises ModelError."""
    found = _config(folder).get("base_model_name_or_path")
    if not isinstance(found, str) or not found:
        raise ModelError(f"{folder / CONFIG}: names no base_model_name_or_path")
    return found


def revision(folder: Path) -> str:
    """The commit of the base that an adapter was trained on; empty where it is a folder. Raises
    ModelError."""
    return str(_config(folder).get("revision") or "")


def options_of(folder: Path) -> AdapterOptions:
    """Rank and alpha of an adapter on disk; its layers are those of its tensors.

    Raises ModelError, also for every setting that is not known to leave plain LoRA as it is.
    """
    config = _config(folder)
    for name, value in config.items():
        if name in READ or name in SAME_FUNCTION or not value or value == PLAIN.get(name):
            continue
        known = {*READ, *SAME_FUNCTION, *PLAIN}
        near = "" if name in PLAIN else nearest(name, known)
        hint = f"; {near}" if near.startswith("did you mean") else ""
        raise ModelError(
            f"{folder / CONFIG}: {name} = {shown(value)} is not supported; only plain LoRA is{hint}"
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ModelError(
            f"{folder / CONFIG}: init_lora_weights = {shown(start)} is not supported: it takes a"
            " part out of the base's weights; save the adapter as plain LoRA, with"
            " save_pretrained(..., path_initial_model_for_weight_conversion=...) of peft"
        )
    try:
        rank, alpha = operator.index(config["r"]), float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(f"{folder / CONFIG}: r and lora_alpha are not both numbers") from error
    if rank < 1 or not math.isfinite(alpha) or not alpha:  # scaled by 0 nothing would train
        raise ModelError(
            f"{folder / CONFIG}: r = {rank} and lora_alpha = {alpha} are no rank and scale of an"
            " adapter"
        )
    return AdapterOptions(rank, alpha)


def read(folder: Path, model_type: str = "") -> Adapter:
    """An adapter in PEFT's format, its tensors by the names of today of a model of `model_type`.
    Raises ModelError."""
    options, file = options_of(folder), folder / WEIGHTS
    try:
        stored = deserialize(paths.read_file(file))  # type: ignore[no-untyped-call]
        tensors = {
            names.current_name(model_type, name.removeprefix(PREFIX)): _float32(**tensor)
            for name, tensor in stored
        }
    except (OSError, SafetensorError, KeyError) as error:
        raise ModelError(f"{file}: cannot be read as an adapter's tensors ({error})") from error
    layers = adapted_layers(tensors)
    expected = {f"{name}{side}" for name in layers for side in (A, B)}
    if not layers or tensors.keys() != expected:
        # A tensor whose partner is missing is named by what is missing.
        wrong, missing = sorted(tensors.keys() - expected), sorted(expected - tensors.keys())
        first = (
            f"it holds {wrong[0]}"
            if wrong
            else f"{missing[0]} is missing"
            if missing
            else "it holds none"
        )
        raise ModelError(
            f"{file}: holds other tensors than lora_A and lora_B of linear layers: {first}"
        )
    for name in layers:
        a, b = tensors[f"{name}{A}"].shape, tensors[f"{name}{B}"].shape
        if len(a) != 2 or len(b) != 2 or (a[0], b[1]) != (options.rank, options.rank):
            raise ModelError(
                f"{file}: its tensors are not of rank {options.rank}, as {CONFIG} says; the first"
                f" is {name}"
            )
    return Adapter(options.rank, options.alpha, tensors)


def fitting(options: ModelOptions, layers: Mapping[str, tuple[int, int]]) -> Adapter:
    """The adapter that `options.adapter` names, which must fit the model's `layers`, as in
    `initial_adapters`. Raises ModelError."""
    assert options.adapter is not None
    adapter = read(options.adapter, model_type(options.path))
    check_fits(adapter.tensors, layers, options.adapter)
    return adapter


def model_type(folder: Path) -> str:
    """The `model_type` of a model folder; empty where config.json has none. Raises ModelError."""
    return str(read_json(Path(folder) / "config.json").get("model_type", ""))


def write_config(
    folder: Path, options: AdapterOptions, tensors: Mapping[str, Any], model: Path
) -> None:
    """Writes PEFT's description of an adapter on the model in `model`, beside the tensors, which
    the backend writes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": hub.name(model) or str(model.resolve()),
        "revision": hub.commit(model) or None,
        "inference_mode": True,
        "r": options.rank,
        "lora_alpha": options.alpha,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "fan_in_fan_out": False,
        # Whole names: a last word alone would also meet layers of the vision tower in some
        # families.
        "target_modules": sorted(adapted_layers(tensors)),
        **PLAIN,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _float32(dtype: str, shape: list[int], data: bytes) -> FloatArray:
    if dtype == "BF16":  # the upper half of a float32, which numpy has no name for
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(
            data, {"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype]
        ).astype(np.float32)
    return values.reshape(shape)


def _config(folder: Path) -> dict[str, Any]:
    check_links(folder)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder / CONFIG}: describes no LoRA adapter")
    return config
