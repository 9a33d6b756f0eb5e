"""Model folders in Hugging Face layout, as mlx-vlm's modules: reading the folder, writing one back, and the names between.

The modules hold no state of ours: parameters live in flat dictionaries by MLX name, and are put into the modules for the time of a
computation (`Model.bound`). Tensor names and layouts of files are Hugging Face's; they differ from MLX's in a prefix, and in the kernels
of convolutions, whose channels MLX keeps last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from huggingface_hub.errors import StrictDataclassError
from mlx.utils import tree_flatten, tree_unflatten

from opd.errors import ModelError, RecipeError, holds_nan, nearest, one_line
from opd.models import adapters, names, settings, weight_formats
from opd.models.files import read_json, tensor_headers, weight_files
from opd.types import ModelOptions
from opd_mlx.families import family
from opd_mlx.families.family import Family
from opd_mlx.layers.layer import Layer
from opd_mlx.model.adapters import add_adapters, linear_layers, merge_adapter, turned
from opd_mlx.model.names import Parameters, channels_last, channels_second, hugging_face
from opd_mlx.model.quantised import dequantised, four_bits, quantisation, quantise_alike
from opd_mlx.vision import KnownFeatures, feature_room

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
        return {self.names[name]: turned(self.names[name], channels_second(value)) for name, value in parameters.items()}

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
    quantised = quantisation(config, partial(hugging_face, of))
    found = dequantised(found, quantised, tables=True)
    quantise_alike(module, found, quantised, partial(hugging_face, of))
    shapes = {name: value.shape for name, value in tree_flatten(module.parameters())}
    named = {name: hugging_face(of, name) for name in shapes}
    names.check(
        {named[name]: shape for name, shape in shapes.items()}, {name: channels_last(value).shape for name, value in found.items()}, folder
    )
    base = Model(folder, of, config, module, of.layers(module, config), named, tied, dtype, None)
    if options.adapters is None:
        return _all_trained(base, options, merge_adapter(options, found, linear_layers(module, named)))
    frozen = {name: channels_last(found[original]) for name, original in named.items()}
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
    parameters = {name: channels_last(found[original]).astype(mx.float32) for name, original in base.names.items()}
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
                part = {hugging_face(of, name): channels_second(value) for name, value in part.items()}
                part = {name: value - 1 if name.endswith(of.raised) else value for name, value in part.items()}
            tensors |= part
        return tensors
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: cannot be read as safetensors ({str(error).splitlines()[0]})") from error


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
