"""Model folders in Hugging Face layout, as mlx-vlm's modules: reading the folder, writing one back, and the names between.

The modules hold no state of ours: parameters live in flat dictionaries by MLX name, and are put into the modules for the time of a
computation (`Model.bound`). Tensor names and layouts of files are Hugging Face's; they differ from MLX's in a prefix, and in the kernels
of convolutions, whose channels MLX keeps last.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_unflatten

from opd.errors import FolderError, ModelError, nearest
from opd.types import ModelOptions
from opd_mlx.attention import Layer
from opd_mlx.families import Family, family
from opd_mlx.vision import KnownFeatures

Parameters: TypeAlias = dict[str, mx.array]
"""Arrays by MLX name."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
"""Files of a model folder that hold weights; an export copies all others beside its own weights."""


@dataclass(frozen=True)
class Model:
    """`module` is mlx-vlm's, and keeps the frozen parameters; `names` maps MLX to Hugging Face names.

    `config` is config.json as transformers completes it; `known` holds image features where the vision tower is frozen.
    """

    folder: Path
    family: Family
    config: Mapping[str, Any]
    module: Any
    layers: Sequence[Layer]
    names: Mapping[str, str]
    tied: bool
    dtype: mx.Dtype
    known: KnownFeatures | None

    @property
    def head_name(self) -> str:
        """Name of the parameter that is the head: the embedding's where they are tied."""
        return next(name for name in self.names if name.endswith("embed_tokens.weight" if self.tied else "lm_head.weight"))

    def head(self, parameters: Parameters) -> mx.array:
        """The float32 head [V, D]."""
        return parameters[self.head_name]

    @contextmanager
    def bound(self, parameters: Parameters) -> Iterator[None]:
        """Has the module compute with `parameters`, cast to the compute dtype, until the context ends."""
        self._put({name: value.astype(self.dtype) for name, value in parameters.items()})
        try:
            yield
        finally:  # the module must keep neither a traced array nor a copy alive
            nothing = mx.array(0.0)
            self._put(dict.fromkeys(parameters, nothing))

    def to_hugging_face(self, parameters: Parameters) -> dict[str, mx.array]:
        """Hugging Face names and layouts."""
        return {self.names[name]: _channels_second(value) for name, value in parameters.items()}

    def _put(self, parameters: Parameters) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def load_model(options: ModelOptions) -> tuple[Model, Parameters]:
    """The model and its trained parameters as float32 masters. Raises ModelError."""
    if options.dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{options.dtype}'; {nearest(options.dtype, DTYPES)}")
    dtype = DTYPES[options.dtype]
    folder = Path(options.path)
    config = read_config(folder)
    of = family(config["model_type"])
    tied = bool(config["tie_word_embeddings"])
    tensors = {_today(of, name): value for name, value in stored_tensors(folder).items()}
    if tied:
        tensors.pop("lm_head.weight", None)  # a copy of the embedding, in files of some writers
    try:
        module = of.build(config, tied)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {error}") from error
    shapes = {name: value.shape for name, value in tree_flatten(module.parameters())}
    names = {name: _hugging_face(of, name) for name in shapes}
    found = {original: _channels_last(value) for original, value in tensors.items()}
    _check({names[name]: shape for name, shape in shapes.items()}, found, folder)
    parameters = {name: found[original].astype(mx.float32) for name, original in names.items()}
    frozen = [] if options.tune_vision else [name for name in names if name.startswith(of.vision)]
    known = KnownFeatures(lambda prompts: of.features(module, prompts)) if frozen else None
    model = Model(folder, of, config, module, of.layers(module, config), names, tied, dtype, known)
    model._put({name: parameters.pop(name).astype(dtype) for name in frozen})
    with model.bound(parameters):
        pass  # what stays in the module is not the random weights it was made with, which are never computed
    mx.eval(parameters, module.parameters())
    return model, parameters


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a supported architecture, as transformers completes it: with every default, in today's form. Raises ModelError."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: holds no JSON object")
    try:
        family(str(config.get("model_type")))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config.get("vision_config"), dict):
        raise ModelError(f"{path}: no vision_config")
    from transformers import AutoConfig

    try:
        return cast("dict[str, Any]", AutoConfig.for_model(**config).to_dict())
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{path} cannot be used: {str(error).splitlines()[0]}") from error


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of the folder's safetensors files by Hugging Face name, not yet read from disk. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        tensors: dict[str, mx.array] = {}
        for file in files:
            if not (folder / file).is_file():
                raise ModelError(f"{folder}: no {file}; a model folder holds config.json and its weights as safetensors")
            tensors |= cast("dict[str, mx.array]", mx.load(str(folder / file)))
        return tensors
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error


def write_model(model: Model, parameters: Parameters, folder: Path) -> None:
    """A Hugging Face model folder: the source's files, with the trained parameters in the source's dtypes."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.folder.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    tensors = stored_tensors(model.folder)
    if model.tied:
        tensors = {name: value for name, value in tensors.items() if _today(model.family, name) != "lm_head.weight"}
    older = {_today(model.family, name): name for name in tensors}
    for name, value in model.to_hugging_face(parameters).items():
        tensors[older[name]] = value.astype(tensors[older[name]].dtype)
    write_tensors(folder / "model.safetensors", tensors)


def write_tensors(file: Path, tensors: Mapping[str, mx.array], **metadata: str) -> None:
    """Writes one safetensors file that transformers accepts."""
    try:
        mx.save_safetensors(str(file), dict(tensors), metadata={"format": "pt", **metadata})
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
    found = {name: _channels_last(value) for name, value in tensors.items()}
    wrong = [name for name, own in expected.items() if name not in found or found[name].shape != like[own].shape]
    if wrong or len(found) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    return {prefix: {name: found[prefix + model.names[name]] for name in like} for prefix in prefixes}, metadata


def _check(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, mx.array], folder: Path) -> None:
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unknown:
        first = f"tensor {missing[0]} is missing" if missing else f"tensor {unknown[0]} is unknown"
        raise ModelError(f"{folder}: weights and config.json do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ModelError(f"{folder}: weights and config.json do not fit: {name} is {found[name].shape}, not {shape}")


def _hugging_face(of: Family, name: str) -> str:
    return _renamed(of.names, name)


def _today(of: Family, name: str) -> str:
    """The name of a file's tensor in transformers' module."""
    return _renamed(of.renamed, name)


def _renamed(prefixes: Mapping[str, str], name: str) -> str:
    prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes.get(prefix, "") + name.removeprefix(prefix)


def _channels_last(value: mx.array) -> mx.array:
    """The kernel of a convolution [out, channel, ...], of which there is no other tensor of more than two axes, as MLX convolves.

    Contiguous, as a step leaves it: so that a restored run computes what the run would have, to the bit.
    """
    return mx.contiguous(mx.moveaxis(value, 1, -1)) if value.ndim > 2 else value


def _channels_second(value: mx.array) -> mx.array:
    return mx.contiguous(mx.moveaxis(value, -1, 1)) if value.ndim > 2 else value
