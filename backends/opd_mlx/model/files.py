"""Writes model folders, and reads and writes the tensors of a checkpoint, in Hugging Face's names and layouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import mlx.core as mx
import numpy as np

from opd.errors import FolderError
from opd.models import inert, names, weight_formats
from opd.models.files import read_json
from opd.models.permissions import as_new
from opd.types import ModelOptions
from opd_mlx.model.adapters import merge, merge_adapter, turned
from opd_mlx.model.load import Model, stored_tensors
from opd_mlx.model.names import Parameters, channels_last, hugging_face
from opd_mlx.model.quantised import dequantised, quantisation


def write_model(model: Model, options: ModelOptions, parameters: Parameters, folder: Path) -> None:
    """A Hugging Face model folder: the source's data files (see `opd.models.inert`), with what was trained in the source's dtypes.

    Adapters are merged. Weights that were quantised are written plain; those that only stood in 4 bits, as they are stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    inert.copy_files(model.folder, folder)
    of, config = model.family, read_json(folder / "config.json")
    if weight_formats.settings(config):
        (folder / "config.json").write_text(json.dumps(weight_formats.without(config), indent=2) + "\n", encoding="utf-8")
    stored = stored_tensors(model.folder, of)
    kind = model.config["model_type"]
    older = names.used(kind, stored, model.folder)
    if model.tied:
        older = names.with_tie(kind, older)
    quantised = quantisation(model.config, partial(hugging_face, of))
    tensors = dequantised({name: stored[old] for name, old in older.items()}, quantised)
    if model.tied:
        tensors.pop(names.HEAD, None)
    trained = model.to_hugging_face(parameters)
    if options.adapters is not None:
        changed = merge(tensors, {name: np.array(value) for name, value in trained.items()}, options.adapters.scale)
    else:
        changed = {**merge_adapter(options, tensors), **trained}
    written = {older[name]: changed[name].astype(value.dtype) for name, value in tensors.items()}
    unread = {name: value for name, value in stored.items() if names.is_left_out(kind, name)}
    write_tensors(folder / "model.safetensors", {**written, **unread})


def write_tensors(file: Path, tensors: Mapping[str, mx.array], **metadata: str) -> None:
    """Writes one safetensors file that transformers accepts."""
    try:
        mx.save_safetensors(str(file), dict(tensors), metadata={"format": "pt", **metadata})
        as_new(file)
    except RuntimeError as error:  # what MLX makes of a full disk or a missing folder
        raise OSError(f"{file}: {str(error).splitlines()[0]}") from error


def read_tensors(file: Path, model: Model, like: Parameters, prefixes: Sequence[str]) -> tuple[dict[str, Parameters], dict[str, str]]:
    """Parameters by prefix, and metadata, of a checkpoint's file, which must hold those of `like` by name and shape. Raises FolderError."""
    try:
        loaded = mx.load(str(file), return_metadata=True)
    except RuntimeError as error:
        raise FolderError(f"{file}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error
    tensors, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
    expected = {prefix + model.names[name]: name for prefix in prefixes for name in like}
    found = {name: turned(name, channels_last(value)) for name, value in tensors.items()}
    wrong = [name for name, own in expected.items() if name not in found or found[name].shape != like[own].shape]
    if wrong or len(found) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    return {prefix: {name: found[prefix + model.names[name]] for name in like} for prefix in prefixes}, metadata
