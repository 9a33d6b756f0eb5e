"""Writes model folders in Hugging Face layout and adapters, and reads and writes checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from opd.errors import FolderError, RecipeError
from opd.models import inert, names, peft_files, weight_formats
from opd.models.files import read_json, tensor_headers
from opd.models.permissions import as_new
from opd.types import ModelOptions
from opd_torch.families.family import Family
from opd_torch.model.adapters import merge
from opd_torch.model.load import Model, master_dtype, read_model
from opd_torch.model.names import stored_names

STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""torch's types by safetensors' names."""

FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors")
"""The files of a checkpoint."""


def write_model(module: Any, family: Family | None, source: Path, folder: Path) -> None:
    """Writes all weights of `module`, with the names and precisions of `source`, and copies the
    data files of `source`.

    Stored tensors that the model does not read are copied. `opd.models.inert` says which files are
    data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stored = tensor_headers(source)
    inert.copy_files(source, folder)
    config = read_json(folder / "config.json")
    if family is None:
        # transformers restores the published names. It also writes a configuration, which
        # `inert.copy_files` overwrites below.
        precision = next(STORED[x.dtype] for x in stored.values() if x.dtype in STORED)
        # `state_dict` lists a tied head twice, `named_parameters` only as the embedding.
        named = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
        state = module.state_dict()
        weights = {name: x.to(precision) for name, x in state.items() if name in named}
        bars = transformers.utils.logging.is_progress_bar_enabled()
        transformers.utils.logging.disable_progress_bar()
        module.save_pretrained(folder, state_dict=weights)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        inert.copy_files(source, folder)
        as_new(*folder.glob("*.safetensors"))
    else:
        older, tensors = stored_names(module, stored, source), {}
        for name, parameter in module.named_parameters():
            precision = STORED[stored[older[name]].dtype]
            tensors[older[name]] = parameter.detach().to(precision)
        for name, tensor in stored.items():
            if names.is_left_out(config["model_type"], name):
                with safe_open(source / tensor.file, framework="pt") as file:
                    tensors[name] = file.get_tensor(name)
        write_tensors(folder / "model.safetensors", tensors)
    if weight_formats.settings(config):  # the source's weights are packed, the written ones plain
        text = json.dumps(weight_formats.without_quantisation(config), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


def export_model(student: Model, options: ModelOptions, folder: Path) -> None:
    """Writes the student as a model folder; adapters are merged into the stored weights of the base
    model.
    """
    source = Path(options.path)
    if options.adapters is None:
        write_model(student.module, student.family, source, folder)
        return
    module, family = read_model(source, master_dtype(options.dtype))
    values = {
        name: parameter.detach().float().cpu().numpy()
        for name, parameter in student.parameters.items()
    }
    merge(module, values, options.adapters.scale)
    write_model(module, family, source, folder)


def write_adapter(student: Model, options: ModelOptions, folder: Path) -> None:
    """Writes the student's adapters in PEFT's format. Raises RecipeError if all weights were
    trained.
    """
    if options.adapters is None:
        raise RecipeError(
            "there is no adapter to export: all weights were trained; export the model"
        )
    peft_files.write_config(folder, options.adapters, student.parameters, Path(options.path))
    named = {f"{peft_files.PREFIX}{name}": value for name, value in student.parameters.items()}
    write_tensors(folder / peft_files.WEIGHTS, named)


def write_checkpoint(folder: Path, state: Sequence[Mapping[str, Tensor]], step: int) -> None:
    """Writes student, teacher and moments by name; the moments' file also has the step count."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in zip(FILES, state, strict=True):
        metadata = {"step": str(step)} if name == FILES[-1] else {}
        write_tensors(folder / name, tensors, **metadata)


def read_checkpoint(folder: Path, state: Sequence[Mapping[str, Tensor]]) -> int:
    """Overwrites student, teacher and moments with those of a checkpoint; returns the step count.

    Raises FolderError before anything is changed.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise FolderError(f"{folder}: no {name}")
    files = [
        read_tensors(folder / name, tensors) for name, tensors in zip(FILES, state, strict=True)
    ]
    with torch.no_grad():
        for tensors, (values, _) in zip(state, files, strict=True):
            for name, tensor in tensors.items():
                tensor.copy_(values[name])
    return int(files[-1][1]["step"])


def write_tensors(file: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes one safetensors file. Raises OSError."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(contiguous, file, metadata={"format": "pt", **metadata})
        as_new(file)
    except SafetensorError as error:  # what safetensors raises for a full disk
        raise OSError(f"{file}: {error}") from error


def read_tensors(
    file: Path, expected: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata of one safetensors file.

    Raises FolderError unless the tensors have the names and shapes of `expected`.
    """
    try:
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise FolderError(f"{file}: cannot be read as safetensors ({error})") from error
    wrong = [
        name
        for name in expected
        if name not in tensors or tensors[name].shape != expected[name].shape
    ]
    if wrong or len(tensors) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    return tensors, metadata
