"""Adapters in PEFT's format: adapter_config.json and adapter_model.safetensors of a folder.

The names of tensors in these files begin with PREFIX.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from opd import paths
from opd.errors import ModelError, nearest, shown
from opd.models import hub, names
from opd.models.adapters import A, Adapter, B, Tensors, adapted_layers, check_fits, fresh_adapters
from opd.models.files import INDEX, SINGLE, check_links, read_json
from opd.types import AdapterOptions, FloatArray, ModelOptions

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

PREFIX = "base_model.model."

PLAIN = {
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "rank_pattern": {},
    "alpha_pattern": {},
    "modules_to_save": None,
}
"""Settings of PEFT that change what an adapter computes, with the only values that are computed
here."""

READ = ("peft_type", "r", "lora_alpha", "base_model_name_or_path", "revision", "init_lora_weights")
"""Settings of PEFT that this module reads."""

SAME_FUNCTION = (
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "runtime_config",
    "lora_dropout",
    # They name the layers with an adapter, as the tensors do.
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    # PEFT reads them only to initialise an adapter, or together with a setting that is refused.
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "megatron_core",
    "qalora_group_size",
    "ensure_weight_tying",
)
"""Settings of PEFT that do not change what an adapter adds to the base model, whatever their
value."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base model's weights as they are; others subtract
the initial adapter from them."""


def initial_adapters(options: ModelOptions, layers: Mapping[str, tuple[int, int]]) -> Tensors:
    """Initial tensors of the adapters of student and teacher: those stored in `options.adapter`,
    else new ones.

    `layers`: (out, in) of every linear layer of the model, by Hugging Face name. Raises RecipeError
    for a target that matches no layer, ModelError if `options.adapter` does not fit the model.
    """
    assert options.adapters is not None
    if options.adapter is None:
        return fresh_adapters(options.adapters, layers)
    return dict(fitting(options, layers).tensors)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter in PEFT's format but not a model. A config.json beside the
    adapter does not make it a model; weights do."""
    is_model = (folder / "config.json").is_file()
    return (folder / CONFIG).is_file() and not (
        is_model and (_has_weights(folder) or not (folder / WEIGHTS).is_file())
    )


def check_alone(folder: Path) -> None:
    """Raises ModelError if a folder holds both a model and an adapter, since transformers would
    load the adapter over the base that the adapter names."""
    if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file() and _has_weights(folder):
        raise ModelError(
            f"{folder} holds a model and an adapter; put {CONFIG} and {WEIGHTS} into a folder of"
            " their own"
        )


def _has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model."""
    return any((folder / name).exists() for name in (SINGLE, INDEX))


def base_model(folder: Path) -> str:
    """Folder or Hugging Face id of the model that an adapter was trained on, as adapter_config.json
    says it. Raises ModelError."""
    name = _config(folder).get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{folder / CONFIG}: names no base_model_name_or_path")
    return name


def revision(folder: Path) -> str:
    """The commit of the base model that an adapter was trained on; empty if the base was a folder.
    Raises ModelError."""
    return str(_config(folder).get("revision") or "")


def options_of(folder: Path) -> AdapterOptions:
    """Rank and alpha of the adapter in `folder`; the stored tensors say which layers have one.

    Raises ModelError if the file cannot be used, or holds a setting that may change what plain LoRA
    computes.
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
    """Reads an adapter in PEFT's format; tensors get the current names of a model of `model_type`.
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
        # If one of A and B is missing, the message names the missing tensor.
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
    """Reads the adapter that `options.adapter` names. Raises ModelError if it does not fit the
    model's `layers`, as in `initial_adapters`."""
    assert options.adapter is not None
    adapter = read(options.adapter, model_type(options.path))
    check_fits(adapter.tensors, layers, options.adapter)
    return adapter


def model_type(folder: Path) -> str:
    """The `model_type` of a model folder; empty if config.json has none. Raises ModelError."""
    return str(read_json(Path(folder) / "config.json").get("model_type", ""))


def write_config(
    folder: Path, options: AdapterOptions, tensors: Mapping[str, Any], model: Path
) -> None:
    """Writes adapter_config.json of an adapter on the model in `model` into `folder`. The backend
    writes the `tensors`."""
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
        # Full names: a last word alone would also match layers of the vision tower in some
        # families.
        "target_modules": sorted(adapted_layers(tensors)),
        **PLAIN,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _float32(dtype: str, shape: list[int], data: bytes) -> FloatArray:
    if dtype == "BF16":  # the upper half of a float32; numpy has no such type
        values = (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        values = np.frombuffer(
            data, {"F32": np.float32, "F16": np.float16, "F64": np.float64}[dtype]
        ).astype(np.float32)
    return values.reshape(shape)


def _config(folder: Path) -> dict[str, Any]:
    """The adapter_config.json of a LoRA adapter. Raises ModelError."""
    check_links(folder)
    config = read_json(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"{folder / CONFIG}: describes no LoRA adapter")
    return config
