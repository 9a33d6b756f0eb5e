"""Reads and writes model folders in Hugging Face layout, and names parameters as their files do."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd import adapters
from opd.errors import FolderError, ModelError, nearest
from opd.types import ModelOptions
from opd_torch.adapters import add_adapters, hugging_face, linear_layers, merge
from opd_torch.quantised import check_four_bits, four_bits
from opd_torch.vision import KnownFeatures

SUPPORTED = {"qwen3_vl": "Qwen3VLForConditionalGeneration"}
"""Architectures this backend can train, by `model_type`, and the transformers class of each."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
"""Compute precisions; parameters are float32, and float64 (for tests) is float64 throughout."""

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Precisions as safetensors names them."""

WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin", ".pt", ".pth", ".gguf")
"""Files of a model folder that an export does not copy."""


def load_model(options: ModelOptions, device: torch.device) -> Any:
    """The model of a folder, on `device`. Raises ModelError, RecipeError and BackendError.

    What is trained is float32: all parameters, without the vision tower's unless `tune_vision`, or the adapters alone. Under adapters the
    model's own weights stand in the compute dtype. Its attribute `known` holds image features where no part of the vision tower is
    trained, and is None elsewhere.
    """
    path = Path(options.path)
    dtype, masters = DTYPES[options.dtype], master_dtype(options.dtype)
    if options.four_bit:
        check_four_bits(device)
    model = read_model(path, dtype if options.adapters else masters, device if options.four_bit else None)
    if options.adapters:
        add_adapters(model, options, masters)
    else:
        if options.adapter:
            adapter = adapters.read(options.adapter)
            adapters.fit(adapter.tensors, linear_layers(model), options.adapter)
            merge(model, adapter.tensors, adapter.alpha / adapter.rank)
        model.model.visual.requires_grad_(options.tune_vision)
    frozen = not any(parameter.requires_grad for parameter in model.model.visual.parameters())
    model.known = KnownFeatures(model.model.visual) if frozen else None
    return (model if options.four_bit else model.to(device)).eval()


def master_dtype(dtype: str) -> torch.dtype:
    """The type of what is trained, where computation is of `dtype`."""
    return torch.float64 if dtype == "float64" else torch.float32


def read_model(path: Path, dtype: torch.dtype, four_bit: torch.device | None = None) -> Any:
    """The model of a folder in `dtype`; on the device `four_bit` with the language model's linear layers in 4 bits. Raises ModelError."""
    config = _config(path)
    if "quantization" in config:
        raise ModelError(f"{path}: these weights are quantised for MLX; train them with --backend mlx, or take the original checkpoint")
    architecture = getattr(transformers, SUPPORTED[config["model_type"]])
    stored = stored_tensors(path)
    # A bar of transformers' own would cut through the caller's progress display.
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with torch.device("meta"):
            empty = architecture(transformers.AutoConfig.from_pretrained(path))
        _check(empty, stored, path)
        more = four_bits(linear_layers(empty), dtype, four_bit) if four_bit else {}
        return architecture.from_pretrained(path, dtype=dtype, local_files_only=True, **more)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


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


def stored_tensors(path: Path) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Precision and shape of every tensor in a model folder's weights. Raises ModelError where weights are missing or broken."""
    index = path / "model.safetensors.index.json"
    parts = sorted(set(_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    stored: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for part in parts:
        if not (path / part).is_file():
            raise ModelError(f"{path}: no {part}; a model folder holds config.json and its weights as safetensors")
        try:
            with safe_open(path / part, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    tensor = file.get_slice(name)
                    stored[name] = STORED.get(tensor.get_dtype(), torch.float32), tuple(tensor.get_shape())
        except SafetensorError as error:
            raise ModelError(f"{path / part} cannot be read as safetensors: {error}") from error
    return stored


def _check(model: Any, stored: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], path: Path) -> None:
    """Raises ModelError where the stored tensors are not those of `model`; transformers would invent what is missing."""
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    # Some writers store a tied head beside the embedding.
    missing, unknown = sorted(expected.keys() - stored.keys()), sorted(stored.keys() - expected.keys() - {"lm_head.weight"})
    if missing or unknown:
        first = f"tensor {missing[0]} is missing" if missing else f"tensor {unknown[0]} is unknown"
        raise ModelError(f"{path}: weights and config.json do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, shape in expected.items():
        if stored[name][1] != shape:
            raise ModelError(f"{path}: weights and config.json do not fit: {name} is {stored[name][1]}, not {shape}")


def write_model(model: Any, source: Path, folder: Path) -> None:
    """Writes all weights, in the precision they had in `source`, and copies every other file of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = stored_tensors(source)
    for file in source.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, folder / file.name)
    tensors = {name: parameter.detach().to(stored[name][0]) for name, parameter in model.named_parameters()}
    write_tensors(folder / "model.safetensors", tensors)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes one safetensors file."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, file, metadata={"format": "pt", **metadata})


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


def _config(path: Path) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise ModelError(f"{path}: no such model folder" if not path.is_dir() else f"{path}: no config.json, so this is no model folder")
    config = _json(path / "config.json")
    kind = str(config.get("model_type"))
    if kind not in SUPPORTED:
        raise ModelError(f"{path}: architecture '{kind}' is not supported by the torch backend; {nearest(kind, SUPPORTED)}")
    return config


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: holds no JSON object")
    return content
