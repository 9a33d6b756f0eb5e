"""Writes model folders in Hugging Face layout, and reads and writes files of tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import FolderError
from opd.models import inert, names, weight_formats
from opd.models.files import read_json, tensor_headers
from opd.models.permissions import as_new
from opd_torch.model.names import stored_names

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""Precisions as safetensors names them."""


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
