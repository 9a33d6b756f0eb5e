"""Reads and writes model folders in Hugging Face layout, and names parameters as their files do."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd import adapters
from opd.errors import FolderError, ModelError, no_weights
from opd.types import ModelOptions
from opd_torch.adapters import add_adapters, hugging_face, linear_layers, merge
from opd_torch.families import Family, family, rows
from opd_torch.kernels.pointwise import quicken
from opd_torch.quantised import check_four_bits, four_bits
from opd_torch.vision import KnownFeatures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Compute precisions; parameters are float32, and float64 (for tests) is float64 throughout."""

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Precisions as safetensors names them."""

Stored: TypeAlias = tuple[torch.dtype, tuple[int, ...], str]
"""Precision and shape of a tensor, and the name of its file."""

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
"""Files of a model folder that an export does not copy."""


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
            adapter = adapters.read(options.adapter)
            adapters.fit(adapter.tensors, linear_layers(model), options.adapter)
            merge(model, adapter.tensors, adapter.alpha / adapter.rank)
        for module in vision:
            module.requires_grad_(options.tune_vision)
        if model.family is None and not options.tune_vision:
            rows.freeze_vision(model, str(path))
    frozen = not any(parameter.requires_grad for module in vision for parameter in module.parameters())
    model.known = KnownFeatures() if vision and frozen else None
    quicken(model, device, options.dtype)
    # A lookup's gradient is some rows, not a table of zeros to be written and added; the meta device has no sparse tensors.
    model.get_input_embeddings().sparse = device.type != "meta"
    return (model if options.four_bit else model.to(device)).eval()


def master_dtype(dtype: str) -> torch.dtype:
    """The type of what is trained, where computation is of `dtype`."""
    return torch.float64 if dtype == "float64" else torch.float32


def read_model(path: Path, dtype: torch.dtype, four_bit: torch.device | None = None) -> Any:
    """The model of a folder in `dtype`; on the device `four_bit` with the language model's linear layers in 4 bits. Raises ModelError."""
    its = _family(path)
    if "quantization" in _json(path / "config.json"):
        raise ModelError(f"{path}: these weights are quantised for MLX; train them with --backend mlx, or take the original checkpoint")
    architecture = getattr(transformers, its.architecture if its else "AutoModelForImageTextToText")
    stored = {parameter_name(its, name): tensor for name, tensor in stored_tensors(path).items()}
    # A bar of transformers' own would cut through the caller's progress display.
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        with torch.device("meta"):
            empty = architecture(config) if its else architecture.from_config(config)
        if its:
            _check(empty, stored, path)
        more = four_bits(linear_layers(empty), dtype, four_bit) if four_bit else {}
        model, found = architecture.from_pretrained(path, dtype=dtype, local_files_only=True, output_loading_info=True, **more)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    wrong = [] if its else [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]
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


def parameter_name(family: Family | None, stored: str) -> str:
    """What transformers calls a tensor of a published file."""
    for start, new in family.older_names.items() if family else ():
        if stored.startswith(start):
            return new + stored[len(start) :]
    return stored


def stored_tensors(path: Path) -> dict[str, Stored]:
    """Precision, shape and file of every tensor in a model folder's weights. Raises ModelError where weights are missing or broken."""
    index = path / "model.safetensors.index.json"
    parts = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    stored: dict[str, Stored] = {}
    for part in parts:
        if not (path / part).is_file():
            raise no_weights(path, part)
        try:
            with safe_open(path / part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    stored[name] = STORED.get(tensor.get_dtype(), torch.float32), tuple(tensor.get_shape()), part
        except SafetensorError as error:
            raise ModelError(f"{path / part} cannot be read as safetensors: {error}") from error
    return stored


def _check(model: Any, stored: Mapping[str, Stored], path: Path) -> None:
    """Raises ModelError where the stored tensors are not those of `model`; transformers would invent what is missing."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # Some writers store a tied head beside the embedding.
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys() - {"lm_head.weight"})
    unknown = [name for name in unknown if not beside(model, name)]
    if missing or unknown:
        first = f"tensor {missing[0]} is missing" if missing else f"tensor {unknown[0]} is unknown"
        raise ModelError(f"{path}: weights and config.json do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, shape in expected.items():
        if stored[name][1] != shape:
            raise ModelError(f"{path}: weights and config.json do not fit: {name} is {stored[name][1]}, not {shape}")


def beside(model: Any, name: str) -> bool:
    """Whether a stored tensor belongs to what transformers leaves out of `model` (the heads that predict further tokens, of Qwen3.5)."""
    return any(re.search(pattern, name) for pattern in model._keys_to_ignore_on_load_unexpected or ())


def write_model(model: Any, source: Path, folder: Path) -> None:
    """Writes all weights, by the names and in the precision they had in `source`, and copies every other file of `source`.

    Tensors that the model leaves out are written as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = stored_tensors(source)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    if model.family is None:
        # transformers' own way back to the published names; it writes a configuration too, which is the source's again afterwards.
        precision = next(iter(stored.values()))[0]
        own = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}  # a tied head has no name of its own
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        model.save_pretrained(folder, state_dict={name: value.to(precision) for name, value in model.state_dict().items() if name in own})
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for name in ("config.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    names = {parameter_name(model.family, name): name for name in stored}
    tensors = {names[name]: parameter.detach().to(stored[names[name]][0]) for name, parameter in model.named_parameters()}
    for name in stored:
        if beside(model, name):
            with safe_open(source / stored[name][2], framework="pt") as file:
                tensors[name] = file.get_tensor(name)
    write_tensors(folder / "model.safetensors", tensors)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt", **metadata})
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
    kind = str(_json(path / "config.json").get("model_type"))
    try:
        return family(kind)
    except ModelError as error:
        if kind in transformers.models.auto.modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
            return None
        raise ModelError(f"{path}: {error}") from None


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return content
