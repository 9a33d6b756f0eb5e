"""Loads model folders in Hugging Face layout."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from opd.errors import ModelError, holds_nan, one_line
from opd.models import adapters, inert, names, settings, weight_formats
from opd.models.files import read_json, tensor_headers
from opd.types import ModelOptions
from opd_torch import rows
from opd_torch.families import family
from opd_torch.families.family import Family
from opd_torch.kernels.pointwise import quicken
from opd_torch.model.adapters import add_adapters, linear_layers, merge
from opd_torch.model.names import check_stored, hugging_face
from opd_torch.model.quantised import check_four_bits, four_bits
from opd_torch.vision import KnownFeatures, feature_room

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Compute precisions; parameters are float32, and float64 (for tests) is float64 throughout."""


def load_model(options: ModelOptions, device: torch.device) -> Any:
    """The model of a folder, on `device`. Raises ModelError, RecipeError and BackendError.

    What is trained is float32: all parameters, without those that make image features unless `tune_vision`, or the adapters alone. Under
    adapters the model's own weights stand in the compute dtype. Its attribute `family` is its family's, or None; `known` holds image
    features where nothing that makes them is trained, and is None elsewhere.
    """
    path = Path(options.path)
    dtype, masters = DTYPES[options.dtype], master_dtype(options.dtype)
    if options.four_bit:
        check_four_bits(device)
    model = read_model(path, dtype if options.adapters else masters, device if options.four_bit else None)
    vision = model.family.vision(model) if model.family else []
    if model.family is None:
        rows.check(model.eval(), str(path))
        logging.getLogger(__name__).warning(
            "%s: no family file for '%s', so a group's completions run as separate rows", path, model.config.model_type
        )
    if options.adapters:
        add_adapters(model, options, masters)
    else:
        if options.adapter:
            adapter = adapters.fitting(options, linear_layers(model))
            merge(model, adapter.tensors, adapter.alpha / adapter.rank)
        for module in vision:
            module.requires_grad_(options.tune_vision)
        if model.family is None and not options.tune_vision:
            rows.freeze_vision(model, str(path))
    frozen = not any(parameter.requires_grad for module in vision for parameter in module.parameters())
    model.known = KnownFeatures(feature_room(device)) if vision and frozen else None
    quicken(model, device, options.dtype)
    # A lookup's gradient is some rows, not a table of zeros to be written and added; the meta device has no sparse tensors.
    model.get_input_embeddings().sparse = device.type != "meta"
    model = (model if options.four_bit else model.to(device)).eval()
    broken = not_finite(model)
    if broken:
        raise holds_nan(path, broken)
    return model


def not_finite(model: Any) -> str | None:
    """Name of a parameter that holds NaN or infinity; None where there is none."""
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        # A sum reads as fast as memory allows; of large numbers it may be infinite by itself.
        if value.is_floating_point() and not value.is_meta and not bool(value.sum().isfinite()) and not bool(value.isfinite().all()):
            return hugging_face(name)
    return None


def master_dtype(dtype: str) -> torch.dtype:
    """The type of what is trained, where computation is of `dtype`."""
    return torch.float64 if dtype == "float64" else torch.float32


def read_model(path: Path, dtype: torch.dtype, four_bit: torch.device | None = None) -> Any:
    """The model of a folder in `dtype`; on the device `four_bit` with the language model's linear layers in 4 bits. Raises ModelError."""
    its = _family(path)
    architecture = getattr(transformers, its.architecture if its else "AutoModelForImageTextToText")
    content, stored = read_json(path / "config.json"), tensor_headers(path)
    kind = str(content.get("model_type"))
    weight_formats.check(content, stored, path)
    names.tell_left_out(stored, path)
    # A bar of transformers' own would cut through the caller's progress display.
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    whole = path
    try:
        with inert.inert(path) as whole:
            config = transformers.AutoConfig.from_pretrained(whole, trust_remote_code=False, local_files_only=True)
            for part in (config, getattr(config, "text_config", None), getattr(config, "vision_config", None)):
                for key in weight_formats.SETTINGS:
                    if hasattr(part, key):
                        delattr(part, key)
            if its:
                settings.check(config.to_dict(), settings.defaults(config), content, path / "config.json", "torch", "mlx")
            if kind == "gemma3":
                config.vision_config.vision_use_head = False  # no forward reads it
            with torch.device("meta"):
                empty = architecture(config) if its else architecture.from_config(config)
            if its:
                check_stored(empty, stored, path)
            more: dict[str, Any] = four_bits(linear_layers(empty), dtype, four_bit) if four_bit else {}
            more |= {"trust_remote_code": False, "use_safetensors": True, "local_files_only": True, "output_loading_info": True}
            model, found = architecture.from_pretrained(whole, config=config, dtype=dtype, **more)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError, StrictDataclassError) as error:
        reason = one_line(error).replace(str(whole), str(path))
        raise ModelError(f"{path} cannot be loaded: {reason}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    # transformers would invent what is missing.
    unexpected = [] if its else [name for name in found["unexpected_keys"] if not names.is_left_out(kind, name)]
    wrong = [*found["missing_keys"], *unexpected, *found["mismatched_keys"]]
    if wrong:
        raise ModelError(f"{path}: weights and config.json do not fit: {len(wrong)} tensors, the first is {wrong[0]}")
    model.family = its
    return model


def copy_model(model: Any) -> Any:
    """A teacher: its own copy of every trained parameter; what is frozen is shared, and what is known of it."""
    shared = [parameter for parameter in model.parameters() if not parameter.requires_grad] + [model.known]
    return copy.deepcopy(model, {id(one): one for one in shared})


def _family(path: Path) -> Family | None:
    """None for what transformers can load and no file here describes."""
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no such model folder" if not path.is_dir() else f"{path}: no config.json, so this is no model folder")
    kind = str(read_json(path / "config.json").get("model_type"))
    try:
        return family(kind)
    except ModelError as error:
        if kind in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return None
        raise ModelError(f"{path}: {error}") from None
