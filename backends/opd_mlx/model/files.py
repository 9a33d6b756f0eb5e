"""Writes model folders in Hugging Face layout and adapters, and reads and writes checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from opd.errors import FolderError, RecipeError
from opd.models import inert, names, peft_files, weight_formats
from opd.models.files import read_json
from opd.models.permissions import as_new
from opd.types import ModelOptions
from opd_mlx.model.adapters import merge, merge_adapter, transposed
from opd_mlx.model.load import Model, stored_tensors
from opd_mlx.model.names import Parameters, channels_last, hugging_face
from opd_mlx.model.quantised import dequantised, quantisation

FILES = ("student.safetensors", "teacher.safetensors", "optimizer.safetensors")
"""The files of a checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The trained parameters of both policies, the optimizer's moments and step count."""

    student: Parameters
    teacher: Parameters
    first: Parameters
    second: Parameters
    step: int


def write_model(model: Model, options: ModelOptions, parameters: Parameters, folder: Path) -> None:
    """Writes the student as a Hugging Face model folder, with the data files and the types of the
    source folder.

    Adapters are merged. Weights that the source stores quantised are written dequantised; weights
    that `four_bit` quantised on loading are written as they are stored. `opd.models.inert` says
    which files are data.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inert.copy_files(model.folder, folder)
    config = read_json(folder / "config.json")
    if weight_formats.settings(config):
        plain = json.dumps(weight_formats.without_quantisation(config), indent=2) + "\n"
        (folder / "config.json").write_text(plain, encoding="utf-8")
    stored = stored_tensors(model.folder, model.family)
    kind = model.config["model_type"]
    older = names.used(kind, stored, model.folder)
    if model.tied:
        older = names.with_tie(kind, older)
    quantised = quantisation(model.config, partial(hugging_face, model.family))
    tensors = dequantised({name: stored[old] for name, old in older.items()}, quantised)
    if model.tied:
        tensors.pop(names.HEAD, None)
    trained = model.to_hugging_face(parameters)
    if options.adapters is not None:
        adapter = {name: np.array(value) for name, value in trained.items()}
        changed = merge(tensors, adapter, options.adapters.scale)
    else:
        changed = {**merge_adapter(options, tensors), **trained}
    written = {older[name]: changed[name].astype(value.dtype) for name, value in tensors.items()}
    unread = {name: value for name, value in stored.items() if names.is_left_out(kind, name)}
    _write_tensors(folder / "model.safetensors", {**written, **unread})


def write_adapter(
    model: Model, options: ModelOptions, parameters: Parameters, folder: Path
) -> None:
    """Writes the student's adapters in PEFT's format. Raises RecipeError if all weights were
    trained.
    """
    if options.adapters is None:
        raise RecipeError(
            "there is no adapter to export: all weights were trained; export the model"
        )
    tensors = model.to_hugging_face(parameters)
    peft_files.write_config(folder, options.adapters, tensors, model.folder)
    named = {f"{peft_files.PREFIX}{name}": value for name, value in tensors.items()}
    _write_tensors(folder / peft_files.WEIGHTS, named)


def write_checkpoint(folder: Path, model: Model, state: Checkpoint) -> None:
    """Writes a checkpoint to FILES; tensors go by Hugging Face name."""
    folder.mkdir(parents=True, exist_ok=True)
    rename = model.to_hugging_face
    moments = {f"first.{name}": value for name, value in rename(state.first).items()}
    moments |= {f"second.{name}": value for name, value in rename(state.second).items()}
    student, teacher, optimizer = FILES
    _write_tensors(folder / student, rename(state.student))
    _write_tensors(folder / teacher, rename(state.teacher))
    _write_tensors(folder / optimizer, moments, step=str(state.step))


def read_checkpoint(folder: Path, model: Model, like: Parameters) -> Checkpoint:
    """Reads a checkpoint that either backend wrote.

    Raises FolderError unless the tensors have the names and shapes of `like`.
    """
    for name in FILES:
        if not (folder / name).is_file():
            raise FolderError(f"{folder}: no {name}")
    files = [folder / name for name in FILES]
    student, teacher = (_read_tensors(file, model, like, [""])[0] for file in files[:2])
    moments, metadata = _read_tensors(files[2], model, like, ["first.", "second."])
    mx.eval(student, teacher, moments)
    step = int(metadata["step"])
    return Checkpoint(student[""], teacher[""], moments["first."], moments["second."], step)


def _write_tensors(file: Path, tensors: Mapping[str, mx.array], **metadata: str) -> None:
    """Writes one safetensors file that transformers accepts. Raises OSError."""
    try:
        mx.save_safetensors(str(file), dict(tensors), metadata={"format": "pt", **metadata})
        as_new(file)
    except RuntimeError as error:  # MLX's error for a full disk or a missing folder
        raise OSError(f"{file}: {str(error).splitlines()[0]}") from error


def _read_tensors(
    file: Path, model: Model, like: Parameters, prefixes: Sequence[str]
) -> tuple[dict[str, Parameters], dict[str, str]]:
    """Reads parameters by prefix, and metadata, from a file of a checkpoint.

    Raises FolderError unless the tensors have the names and shapes of `like`.
    """
    try:
        loaded = mx.load(str(file), return_metadata=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise FolderError(f"{file}: cannot be read as safetensors ({reason})") from error
    tensors, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
    expected = {prefix + model.names[name]: name for prefix in prefixes for name in like}
    read = {name: transposed(name, channels_last(value)) for name, value in tensors.items()}
    wrong = [
        name
        for name, ours in expected.items()
        if name not in read or read[name].shape != like[ours].shape
    ]
    if wrong or len(read) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    by_prefix = {
        prefix: {name: read[prefix + model.names[name]] for name in like} for prefix in prefixes
    }
    return by_prefix, metadata
