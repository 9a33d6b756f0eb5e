"""Model folders in Hugging Face layout, as mlx-vlm's modules: reading the folder, writing one back, and the names between.

The modules hold no state of ours: parameters live in flat dictionaries by MLX name, and are put into the modules for the time of a
computation (`Model.bound`). Tensor names and layouts of files are Hugging Face's; they differ from MLX's in a prefix, and in the kernels
of convolutions, whose channels MLX keeps last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

import mlx.core as mx
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_unflatten

from opd.errors import FolderError, ModelError, RecipeError, holds_nan, nearest, one_line
from opd.models import adapters, inert, names, settings, weight_formats
from opd.models.files import read_json, tensor_headers, weight_files
from opd.models.permissions import as_new
from opd.types import ModelOptions
from opd_mlx.adapters import Layers, add_adapters, linear_layers, merge, turned
from opd_mlx.attention import Layer
from opd_mlx.families import Family, family
from opd_mlx.quantised import dequantised, four_bits, quantisation, quantise_alike
from opd_mlx.vision import KnownFeatures, feature_room

Parameters: TypeAlias = dict[str, mx.array]
"""Arrays by MLX name."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Model:
    """`module` is mlx-vlm's, and keeps the frozen parameters; `names` maps MLX to Hugging Face names.

    `config` is config.json as transformers completes it; `known` holds image features where nothing that makes them is trained;
    `frozen_head` is the head where it is not trained.
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
    frozen_head: mx.array | None = None

    @property
    def head_name(self) -> str:
        """Name of the parameter that is the head: the embedding's where they are tied."""
        return next(name for name in self.names if name.endswith("embed_tokens.weight" if self.tied else "lm_head.weight"))

    @property
    def embedding_name(self) -> str:
        """Name of the parameter in which tokens are looked up."""
        return next(name for name in self.names if name.endswith("embed_tokens.weight"))

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
    config, headers = read_config(folder), tensor_headers(folder)
    weight_formats.check(read_json(folder / "config.json"), headers, folder, reads_mlx=True)
    if not any(name.endswith(".scales") for name in headers):
        config["quantization"] = None
    if config["quantization"] and options.adapters is None:
        raise RecipeError(f"{folder}: quantised weights cannot be trained themselves; train adapters over them: --set model.tune=lora")
    of = family(config["model_type"])
    stored = stored_tensors(folder, of)
    names.tell_left_out(stored, folder)
    found, tied = _used(config, stored, folder)
    try:
        module = of.build(config, tied)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {error}") from error
    quantised = quantisation(config, partial(_hugging_face, of))
    found = dequantised(found, quantised, tables=True)
    quantise_alike(module, found, quantised, partial(_hugging_face, of))
    shapes = {name: value.shape for name, value in tree_flatten(module.parameters())}
    named = {name: _hugging_face(of, name) for name in shapes}
    names.check(
        {named[name]: shape for name, shape in shapes.items()}, {name: _channels_last(value).shape for name, value in found.items()}, folder
    )
    base = Model(folder, of, config, module, of.layers(module, config), named, tied, dtype, None)
    if options.adapters is None:
        return _all_trained(base, options, _merged(options, found, linear_layers(module, named)))
    frozen = {name: _channels_last(found[original]) for name, original in named.items()}
    frozen = {name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value for name, value in frozen.items()}
    module.update(tree_unflatten(list(frozen.items())))
    layers = linear_layers(module, named)
    if options.four_bit:
        four_bits(module, {path for name, (path, _) in layers.items() if adapters.part(name) == "language"})
    parameters, trained = add_adapters(module, options, layers)
    visible = any(adapters.part(name) in ("vision", "projector") for name in trained.values())
    model = replace(
        base,
        layers=of.layers(module, config),  # anew: quantised and adapted modules took the place of those that were there
        names={**named, **trained},
        known=None if visible else KnownFeatures(partial(of.features, module), feature_room()),
        frozen_head=frozen[base.head_name],
    )
    with model.bound(parameters):
        pass
    mx.eval(parameters, module.parameters())
    broken = not_finite(model, parameters)
    if broken:
        raise holds_nan(model.folder, broken)
    return model, parameters


def not_finite(model: Model, parameters: Parameters) -> str | None:
    """Hugging Face name of a trained or frozen parameter that holds NaN or infinity; None where there is none."""
    held = {**dict(tree_flatten(model.module.parameters())), **parameters}
    floats = {name: value for name, value in held.items() if mx.issubdtype(value.dtype, mx.floating)}
    # A sum reads as fast as memory allows; of large numbers it may be infinite by itself.
    sums = {name: value.sum() for name, value in floats.items()}
    mx.eval(sums)
    for name, found in sums.items():
        if not np.isfinite(found.item()) and not mx.isfinite(floats[name]).all().item():
            plain = name.replace(".linear.", ".")  # of an adapted layer
            return str(model.names.get(plain, plain))
    return None


def _all_trained(base: Model, options: ModelOptions, found: Mapping[str, mx.array]) -> tuple[Model, Parameters]:
    """A model whose parameters are all trained, the vision tower's where that is asked for."""
    parameters = {name: _channels_last(found[original]).astype(mx.float32) for name, original in base.names.items()}
    frozen = [] if options.tune_vision else [name for name in base.names if name.startswith(base.family.vision)]
    known = KnownFeatures(partial(base.family.features, base.module), feature_room()) if frozen else None
    model, dtype, module = replace(base, known=known), base.dtype, base.module
    model._put({name: parameters.pop(name).astype(dtype) for name in frozen})
    with model.bound(parameters):
        pass  # what stays in the module is not the random weights it was made with, which are never computed
    mx.eval(parameters, module.parameters())
    broken = not_finite(model, parameters)
    if broken:
        raise holds_nan(model.folder, broken)
    return model, parameters


def _merged(options: ModelOptions, tensors: Mapping[str, mx.array], layers: Layers | None = None) -> Mapping[str, mx.array]:
    """The stored tensors, with the adapter that the options name added to them; it must fit `layers`."""
    if options.adapter is None:
        return tensors
    if layers is None:
        adapter = adapters.read(options.adapter, adapters.model_type(options.path))
    else:
        adapter = adapters.fitting(options, {name: shape for name, (_, shape) in layers.items()})
    return merge(tensors, adapter.tensors, adapter.alpha / adapter.rank)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a supported architecture, as transformers completes it: with every default, in today's form. Raises ModelError."""
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no model folder")
    config = read_json(path)
    try:
        family(str(config.get("model_type")))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config.get("vision_config"), dict):
        raise ModelError(f"{path}: no vision_config")
    from transformers import AutoConfig

    try:
        # transformers would take the settings of MLX's quantisation for some of its own.
        found = AutoConfig.for_model(**weight_formats.without(config))
        completed, plain = found.to_dict(), settings.defaults(found)
        settings.check(completed, plain, config, path, "mlx", "cpu")
        # mlx-vlm's own classes read keys that transformers does not know.
        return {**settings.known(completed, plain), "quantization": weight_formats.mlx_settings(config)}
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{path} cannot be used: {one_line(error)}") from error


def stored_tensors(folder: Path, of: Family) -> dict[str, mx.array]:
    """All tensors of the folder's safetensors files by Hugging Face name, not yet read from disk. Raises ModelError."""
    try:
        tensors: dict[str, mx.array] = {}
        for file in weight_files(folder):
            loaded = mx.load(str(folder / file), return_metadata=True)
            part, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
            if metadata.get("format") == "mlx":  # names and layouts are MLX's, and norms that count from 1
                part = {_hugging_face(of, name): _channels_second(value) for name, value in part.items()}
                part = {name: value - 1 if name.endswith(of.raised) else value for name, value in part.items()}
            tensors |= part
        return tensors
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error


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
    quantised = quantisation(model.config, partial(_hugging_face, of))
    tensors = dequantised({name: stored[old] for name, old in older.items()}, quantised)
    if model.tied:
        tensors.pop(names.HEAD, None)
    trained = model.to_hugging_face(parameters)
    if options.adapters is not None:
        changed = merge(tensors, {name: np.array(value) for name, value in trained.items()}, options.adapters.scale)
    else:
        changed = {**_merged(options, tensors), **trained}
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
    found = {name: turned(name, _channels_last(value)) for name, value in tensors.items()}
    wrong = [name for name, own in expected.items() if name not in found or found[name].shape != like[own].shape]
    if wrong or len(found) != len(expected):
        what = f"the first that differs is {wrong[0]}" if wrong else "it holds others too"
        raise FolderError(f"{file}: these are not the tensors of this model; {what}")
    return {prefix: {name: found[prefix + model.names[name]] for name in like} for prefix in prefixes}, metadata


def _used(config: Mapping[str, Any], stored: Mapping[str, mx.array], folder: Path) -> tuple[dict[str, mx.array], bool]:
    """Tensors that a forward reads, by their names in transformers' module, and whether the head is the embedding.

    As transformers decides that: a head that the files hold beside the embedding, and that differs from it, is its own.
    """
    older = names.used(config["model_type"], stored, folder)
    tied = bool(config["tie_word_embeddings"])
    if tied:
        older = names.with_tie(config["model_type"], older)
    found = {name: stored[old] for name, old in older.items()}
    if not tied:
        return found, False
    head = {name: value for name, value in found.items() if name.startswith("lm_head.")}
    embedding = next((name.removesuffix("weight") for name in found if name.endswith("embed_tokens.weight")), "")
    same = all(_equal(value, found.get(embedding + name.removeprefix("lm_head."))) for name, value in head.items())
    return {name: value for name, value in found.items() if not (same and name in head)}, same


def _equal(one: mx.array, other: mx.array | None) -> bool:
    return other is not None and one.shape == other.shape and bool(mx.array_equal(one, other))


def _hugging_face(of: Family, name: str) -> str:
    return _renamed(of.names, name)


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
