"""A Qwen3-VL in Hugging Face layout, as mlx-vlm's modules: reading the folder, writing one back, and the names between.

The modules hold no state of ours: parameters live in flat dictionaries by MLX name, and are put into the modules for the time of a
computation (`Model.bound`). Tensor names and layouts of files are Hugging Face's; they differ from MLX's in a prefix, and in the patch
embedding, whose channels MLX keeps last.
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
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from opd import adapters
from opd.errors import FolderError, ModelError, RecipeError, nearest
from opd.types import ModelOptions
from opd_mlx.adapters import Layers, add_adapters, linear_layers, merge, turned
from opd_mlx.quantised import dequantised, four_bits, quantisation, quantise_alike
from opd_mlx.vision import KnownFeatures

Parameters: TypeAlias = dict[str, mx.array]
"""Arrays by MLX name."""

SUPPORTED = ("qwen3_vl",)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
VISION = "vision_tower."
PREFIXES = {"language_model.model.": "model.language_model.", VISION: "model.visual.", "language_model.lm_head.": "lm_head."}
"""Where MLX and Hugging Face names differ; they end alike."""

EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}
"""Files of a model folder that hold weights; an export copies all others beside its own weights."""


@dataclass(frozen=True)
class Model:
    """`module` is mlx-vlm's, and keeps the frozen parameters; `names` maps MLX to Hugging Face names.

    `known` holds image features where no part of the vision tower is trained; `frozen_head` is the head where it is not.
    """

    folder: Path
    module: Any
    names: Mapping[str, str]
    tied: bool
    dtype: mx.Dtype
    known: KnownFeatures | None
    frozen_head: mx.array | None = None

    @property
    def head_name(self) -> str:
        """Name of the parameter that is the head: the embedding's where they are tied."""
        return EMBEDDING if self.tied else HEAD

    def head(self, parameters: Parameters) -> mx.array:
        """The head [V, D]: float32, or in the compute dtype where it is frozen."""
        return parameters[self.head_name] if self.frozen_head is None else self.frozen_head

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
        return {self.names[name]: turned(self.names[name], _channels_second(value)) for name, value in parameters.items()}

    def _put(self, parameters: Parameters) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def load_model(options: ModelOptions) -> tuple[Model, Parameters]:
    """The model, and what is trained as float32 masters: all parameters, or the adapters alone. Raises ModelError and RecipeError."""
    if options.dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{options.dtype}'; {nearest(options.dtype, DTYPES)}")
    dtype = DTYPES[options.dtype]
    folder = Path(options.path)
    config = _config(folder)
    if config.get("quantization") and options.adapters is None:
        raise RecipeError(f"{folder}: quantised weights cannot be trained themselves; train adapters over them: --set model.tune=lora")
    tied = bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))
    quantised = quantisation(config, _hugging_face)
    found = dequantised(stored_tensors(folder), quantised, tables=True)
    if tied:
        found.pop("lm_head.weight", None)  # a copy of the embedding, in files of some writers
    module = _build(config, tied, folder)
    quantise_alike(module, found, quantised, _hugging_face)
    shapes = {name: value.shape for name, value in tree_flatten(module.parameters())}
    names = {name: _hugging_face(name) for name in shapes}
    _check({names[name]: shape for name, shape in shapes.items()}, {name: _channels_last(value) for name, value in found.items()}, folder)
    if options.adapters is None:
        return _all_trained(options, module, names, tied, _merged(options, found, linear_layers(module, names)))
    frozen = {name: _channels_last(found[original]) for name, original in names.items()}
    frozen = {name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value for name, value in frozen.items()}
    module.update(tree_unflatten(list(frozen.items())))
    layers = linear_layers(module, names)
    if options.four_bit:
        four_bits(module, {path for name, (path, _) in layers.items() if adapters.part(name) == "language"})
    parameters, trained = add_adapters(module, options, layers)
    visible = any(adapters.part(name) in ("vision", "projector") for name in trained.values())
    known = None if visible else KnownFeatures(module.vision_tower)
    model = Model(folder, module, {**names, **trained}, tied, dtype, known, frozen[EMBEDDING if tied else HEAD])
    with model.bound(parameters):
        pass
    mx.eval(parameters, module.parameters())
    return model, parameters


def _all_trained(
    options: ModelOptions, module: Any, names: Mapping[str, str], tied: bool, found: Mapping[str, mx.array]
) -> tuple[Model, Parameters]:
    """A model whose parameters are all trained, the vision tower's where that is asked for."""
    dtype = DTYPES[options.dtype]
    parameters = {name: _channels_last(found[original]).astype(mx.float32) for name, original in names.items()}
    frozen = [] if options.tune_vision else [name for name in names if name.startswith(VISION)]
    model = Model(Path(options.path), module, names, tied, dtype, KnownFeatures(module.vision_tower) if frozen else None)
    model._put({name: parameters.pop(name).astype(dtype) for name in frozen})
    with model.bound(parameters):
        pass  # what stays in the module is not the random weights it was made with, which are never computed
    mx.eval(parameters, module.parameters())
    return model, parameters


def _merged(options: ModelOptions, tensors: Mapping[str, mx.array], layers: Layers | None = None) -> Mapping[str, mx.array]:
    """The stored tensors, with the adapter that the options name added to them; it must fit `layers`."""
    if options.adapter is None:
        return tensors
    adapter = adapters.read(options.adapter)
    if layers is not None:
        adapters.fit(adapter.tensors, {name: shape for name, (_, shape) in layers.items()}, options.adapter)
    return merge(tensors, adapter.tensors, adapter.alpha / adapter.rank)


def _config(folder: Path) -> dict[str, Any]:
    """The config.json of a supported architecture. Raises ModelError."""
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
    if config.get("model_type") not in SUPPORTED:
        kind = str(config.get("model_type"))
        raise ModelError(f"{path}: architecture '{kind}' is not supported by the mlx backend; {nearest(kind, SUPPORTED)}")
    missing = [section for section in ("text_config", "vision_config") if not isinstance(config.get(section), dict)]
    if missing:
        raise ModelError(f"{path}: no {missing[0]}")
    return config


def stored_tensors(folder: Path) -> dict[str, mx.array]:
    """All tensors of the folder's safetensors files by Hugging Face name, not yet read from disk. Raises ModelError."""
    index = folder / "model.safetensors.index.json"
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
        tensors: dict[str, mx.array] = {}
        for file in files:
            if not (folder / file).is_file():
                raise ModelError(f"{folder}: no {file}; a model folder holds config.json and its weights as safetensors")
            loaded = mx.load(str(folder / file), return_metadata=True)
            part, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
            if metadata.get("format") == "mlx":  # names and layouts are MLX's
                part = {_hugging_face(name): _channels_second(value) for name, value in part.items()}
            tensors |= part
        return tensors
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error


def write_model(model: Model, options: ModelOptions, parameters: Parameters, folder: Path) -> None:
    """A Hugging Face model folder: the source's files, with what was trained in the source's dtypes.

    Adapters are merged. Weights that were quantised are written plain; those that only stood in 4 bits, as they are stored.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in model.folder.iterdir():
        if file.is_file() and file.suffix not in WEIGHTS and not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    config = _config(model.folder)
    if config.get("quantization"):
        plain = {name: value for name, value in config.items() if not name.startswith("quantization")}
        (folder / "config.json").write_text(json.dumps(plain, indent=2), encoding="utf-8")
    tensors = dequantised(stored_tensors(model.folder), quantisation(config, _hugging_face))
    if model.tied:
        tensors.pop("lm_head.weight", None)
    trained = model.to_hugging_face(parameters)
    if options.adapters is not None:
        changed = merge(tensors, {name: np.array(value) for name, value in trained.items()}, options.adapters.scale)
    else:
        changed = {**_merged(options, tensors), **trained}
    write_tensors(folder / "model.safetensors", {name: changed[name].astype(value.dtype) for name, value in tensors.items()})


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
    found = {name: turned(name, _channels_last(value)) for name, value in tensors.items()}
    wrong = [name for name, own in expected.items() if name not in found or found[name].shape != like[own].shape]
    if wrong or len(found) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    return {prefix: {name: found[prefix + model.names[name]] for name in like} for prefix in prefixes}, metadata


def _build(config: dict[str, Any], tied: bool, folder: Path) -> Any:
    """mlx-vlm's module. Rotary settings of transformers 5 (`rope_parameters`) are given under the names mlx-vlm reads."""
    from mlx_vlm.models.qwen3_vl import Model as Module
    from mlx_vlm.models.qwen3_vl import ModelConfig

    text, vision = dict(config["text_config"]), {**config["vision_config"], "model_type": "qwen3_vl"}
    rope = text.get("rope_parameters") or {}
    text.setdefault("rope_theta", rope.get("rope_theta"))
    text["rope_scaling"] = {"rope_type": "default", **rope, **(text.get("rope_scaling") or {})}
    text["tie_word_embeddings"] = tied
    try:
        text.setdefault("head_dim", text["hidden_size"] // text["num_attention_heads"])
        return Module(ModelConfig.from_dict({**config, "text_config": text, "vision_config": vision}))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {error}") from error


def _check(shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, mx.array], folder: Path) -> None:
    missing, unknown = sorted(shapes.keys() - found.keys()), sorted(found.keys() - shapes.keys())
    if missing or unknown:
        first = f"tensor {missing[0]} is missing" if missing else f"tensor {unknown[0]} is unknown"
        raise ModelError(f"{folder}: weights and config.json do not fit: {first} ({len(missing)} missing, {len(unknown)} unknown)")
    for name, shape in shapes.items():
        if found[name].shape != shape:
            raise ModelError(f"{folder}: weights and config.json do not fit: {name} is {found[name].shape}, not {shape}")


def _hugging_face(name: str) -> str:
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + name.removeprefix(prefix)


def _channels_last(value: mx.array) -> mx.array:
    """The patch embedding [out, channel, time, height, width], the only tensor of five axes, as MLX convolves.

    Contiguous, as a step leaves it: so that a restored run computes what the run would have, to the bit.
    """
    return mx.contiguous(value.transpose(0, 2, 3, 4, 1)) if value.ndim == 5 else value


def _channels_second(value: mx.array) -> mx.array:
    return mx.contiguous(value.transpose(0, 4, 1, 2, 3)) if value.ndim == 5 else value
