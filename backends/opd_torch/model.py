"""Reads and writes model folders in Hugging Face layout, and names parameters as their files do."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import FolderError, ModelError, holds_nan, one_line
from opd.models import adapters, inert, names, settings, weight_formats
from opd.models.files import StoredTensor, read_json, tensor_headers
from opd.models.permissions import as_new
from opd.types import ModelOptions
from opd_torch.adapters import add_adapters, hugging_face, linear_layers, merge
from opd_torch.families import Family, family, rows
from opd_torch.kernels.pointwise import quicken
from opd_torch.quantised import check_four_bits, four_bits
from opd_torch.vision import KnownFeatures, feature_room

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Compute precisions; parameters are float32, and float64 (for tests) is float64 throughout."""

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Precisions as safetensors names them."""


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
                _check(empty, stored, path)
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


def trained_parameters(model: Any) -> dict[str, Tensor]:
    """Trained parameters by Hugging Face name; a tied head goes by the embedding's name."""
    return {hugging_face(name): parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def head_name(model: Any) -> str:
    """Name of the parameter that is the head: the embedding's where they are tied."""
    return str(next(name for name, parameter in model.named_parameters() if parameter is model.lm_head.weight))


def stored_names(model: Any, stored: Mapping[str, StoredTensor], path: Path) -> dict[str, str]:
    """The name in the files of every tensor that a forward may read, by parameter of `model`. Raises ModelError."""
    kind = model.config.model_type
    used = names.used(kind, stored, path)
    return names.with_tie(kind, used) if model.config.tie_word_embeddings else used


def _check(model: Any, stored: Mapping[str, StoredTensor], path: Path) -> None:
    """Raises ModelError where the stored tensors are not those of `model`; transformers would invent what is missing."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    found = {name: stored[old].shape for name, old in stored_names(model, stored, path).items()}
    # Some writers store a tied head beside the embedding.
    if model.config.tie_word_embeddings:
        found.pop(names.HEAD, None)
    names.check(expected, found, path)


def write_model(model: Any, source: Path, folder: Path) -> None:
    """Writes all weights, by the names and in the precision they had in `source`, and copies its data files (see `opd.models.inert`).

    Tensors that the model leaves out are written as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = tensor_headers(source)
    inert.copy_files(source, folder)
    config = read_json(folder / "config.json")
    if model.family is None:
        # transformers' own way back to the published names; it writes a configuration too, which is the source's again afterwards.
        precision = STORED[next(tensor.dtype for tensor in stored.values() if tensor.dtype in STORED)]
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # a tied head has no name of its own
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder, state_dict={name: value.to(precision) for name, value in model.state_dict().items() if name in own})
        if bars:
            transformers.utils.logging.enable_progress_bar()
        inert.copy_files(source, folder)
        as_new(*folder.glob("*.safetensors"))
    else:
        older = stored_names(model, stored, source)
        tensors = {older[name]: parameter.detach().to(STORED[stored[older[name]].dtype]) for name, parameter in model.named_parameters()}
        for name, tensor in stored.items():
            if names.is_left_out(config["model_type"], name):
                with safe_open(source / tensor.file, framework="pt") as file:
                    tensors[name] = file.get_tensor(name)
        write_tensors(folder / "model.safetensors", tensors)
    if weight_formats.settings(config):  # left over, of weights that are plain
        (folder / "config.json").write_text(json.dumps(weight_formats.without(config), indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt", **metadata})
        as_new(file)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise OSError(f"{file}: {error}") from error


def read_tensors(file: Path, expected: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one safetensors file, which must hold those of `expected` by name and shape. Raises FolderError."""
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{file}: cannot be read as safetensors ({error})") from error
    wrong = [name for name in expected if name not in tensors or tensors[name].shape != expected[name].shape]
    if wrong or len(tensors) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    return tensors, metadata


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
