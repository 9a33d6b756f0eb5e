"""Reads model folders in Hugging Face layout into mlx-vlm's modules.

The modules hold no state of ours: parameters live in flat dictionaries by MLX name, and are put
into the modules for the time of a computation (`Model.bound`).
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
from opd.types import ModelOptions, Prompt
from opd_mlx.device import Device
from opd_mlx.families import family
from opd_mlx.families.family import Family
from opd_mlx.layers.layer import Layer
from opd_mlx.model.adapters import add_adapters, linear_layers, merge_adapter, transposed
from opd_mlx.model.names import Parameters, channels_last, channels_second, hugging_face
from opd_mlx.model.quantised import dequantised, four_bits, quantisation, quantise_alike
from opd_mlx.vision import FeatureCache

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Model:
    """`module` is mlx-vlm's, and keeps the frozen parameters; `names` maps MLX to Hugging Face
    names.

    `config` is config.json as transformers completes it; `feature_cache` holds image features if
    nothing that makes them is trained; `frozen_head` is the head if it is not trained.
    """

    folder: Path
    family: Family
    config: Mapping[str, Any]
    module: Any
    device: Device
    layers: Sequence[Layer]
    names: Mapping[str, str]
    tied: bool
    dtype: mx.Dtype
    feature_cache: FeatureCache | None = None
    frozen_head: mx.array | None = None

    @property
    def head_name(self) -> str:
        """Name of the parameter that is the head: the embedding's where they are tied."""
        ending = "embed_tokens.weight" if self.tied else "lm_head.weight"
        return next(name for name in self.names if name.endswith(ending))

    @property
    def embedding_name(self) -> str:
        """Name of the parameter in which tokens are looked up."""
        return next(name for name in self.names if name.endswith("embed_tokens.weight"))

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        return int(self.config["text_config"]["vocab_size"])

    def head(self, parameters: Parameters) -> mx.array:
        """The head [V, D]: float32, or in the compute dtype where it is frozen."""
        return parameters[self.head_name] if self.frozen_head is None else self.frozen_head

    def features(self, prompts: Sequence[Prompt], recompute: float = 0) -> list[mx.array]:
        """Features of all visual tokens of `prompts`, by level, from the cache if there is one."""
        if self.feature_cache is not None:
            return self.feature_cache.features(prompts)
        return self.family.features(self.module, prompts, self.device, recompute)

    @contextmanager
    def bound(self, parameters: Parameters) -> Iterator[None]:
        """Within the context the module computes with `parameters`, cast to the compute dtype."""
        self._put({name: value.astype(self.dtype) for name, value in parameters.items()})
        try:
            yield
        finally:  # the module must keep neither a traced array nor a copy alive
            nothing = mx.array(0.0)
            self._put(dict.fromkeys(parameters, nothing))

    def to_hugging_face(self, parameters: Parameters) -> dict[str, mx.array]:
        """The same by Hugging Face name and in Hugging Face's layouts."""
        return {
            self.names[name]: transposed(self.names[name], channels_second(value))
            for name, value in parameters.items()
        }

    def _put(self, parameters: Parameters) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def load_model(options: ModelOptions, device: Device) -> tuple[Model, Parameters]:
    """The model, and what is trained as float32 masters: all parameters, or the adapters alone.

    Raises ModelError and RecipeError.
    """
    if options.dtype not in DTYPES:
        raise ModelError(f"unknown dtype '{options.dtype}'; {nearest(options.dtype, DTYPES)}")
    folder = Path(options.path)
    config, headers = read_config(folder), tensor_headers(folder)
    weight_formats.check(read_json(folder / "config.json"), headers, folder, reads_mlx=True)
    if not any(name.endswith(".scales") for name in headers):
        config["quantization"] = None
    if config["quantization"] and options.adapters is None:
        raise RecipeError(
            f"{folder}: quantised weights cannot be trained themselves; "
            "train adapters over them: --set model.tune=lora"
        )
    kind = family(config["model_type"])
    stored = stored_tensors(folder, kind)
    names.tell_left_out(stored, folder)
    tensors, tied = _used(config, stored, folder)
    try:
        module = kind.build(config, tied)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {error}") from error
    rename = partial(hugging_face, kind)
    quantised = quantisation(config, rename)
    tensors = dequantised(tensors, quantised, tables=True)
    quantise_alike(module, tensors, quantised, rename)
    shapes = {name: value.shape for name, value in dict(tree_flatten(module.parameters())).items()}
    named = {name: rename(name) for name in shapes}
    wanted = {named[name]: shape for name, shape in shapes.items()}
    names.check(
        wanted, {name: channels_last(value).shape for name, value in tensors.items()}, folder
    )
    dtype, layers = DTYPES[options.dtype], kind.layers(module, config, device)
    model = Model(folder, kind, config, module, device, layers, named, tied, dtype)
    if options.adapters is None:
        merged = merge_adapter(options, tensors, linear_layers(module, named))
        model, parameters = _all_trained(model, options, merged)
    else:
        model, parameters = _adapters_trained(model, options, tensors)
    with model.bound(parameters):
        pass  # so that the module lets go of the random weights it was made with
    mx.eval(parameters, module.parameters())
    broken = not_finite(model, parameters)
    if broken:
        raise holds_nan(model.folder, broken)
    return model, parameters


def not_finite(model: Model, parameters: Parameters) -> str | None:
    """Hugging Face name of a parameter that holds NaN or infinity; None: none does."""
    held = {**dict(tree_flatten(model.module.parameters())), **parameters}
    floats = {k: value for k, value in held.items() if mx.issubdtype(value.dtype, mx.floating)}
    # A sum reads as fast as memory allows; of large numbers it may be infinite by itself.
    sums = {name: value.sum() for name, value in floats.items()}
    mx.eval(sums)
    for name, total in sums.items():
        if not np.isfinite(total.item()) and not mx.isfinite(floats[name]).all().item():
            plain = name.replace(".linear.", ".")  # of an adapted layer
            return str(model.names.get(plain, plain))
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a supported architecture as transformers completes it, with every default.

    Raises ModelError.
    """
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
        # transformers would take the settings of MLX's quantisation for its own.
        found = AutoConfig.for_model(**weight_formats.without_quantisation(config))
        completed, plain = found.to_dict(), settings.defaults(found)
        settings.check(completed, plain, config, path, "mlx", "cpu")
        # mlx-vlm's own classes read keys that transformers does not know.
        known, quantised = (
            settings.without_unknown(completed, plain),
            weight_formats.mlx_settings(config),
        )
        return {**known, "quantization": quantised}
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{path} cannot be used: {one_line(error)}") from error


def stored_tensors(folder: Path, kind: Family) -> dict[str, mx.array]:
    """All tensors of the folder's safetensors files by Hugging Face name, not yet read from disk.

    Raises ModelError.
    """
    try:
        tensors: dict[str, mx.array] = {}
        for file in weight_files(folder):
            loaded = mx.load(str(folder / file), return_metadata=True)
            part, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
            if metadata.get("format") == "mlx":
                # Names and layouts are MLX's, and some norms count from 1.
                part = {hugging_face(kind, k): channels_second(value) for k, value in part.items()}
                part = {
                    k: value - 1 if k.endswith(kind.raised) else value for k, value in part.items()
                }
            tensors |= part
        return tensors
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{folder}: cannot be read as safetensors ({reason})") from error


def _all_trained(
    model: Model, options: ModelOptions, tensors: Mapping[str, mx.array]
) -> tuple[Model, Parameters]:
    """A model whose parameters are all trained, or all but the vision tower's."""
    parameters = {
        name: channels_last(tensors[original]).astype(mx.float32)
        for name, original in model.names.items()
    }
    if options.tune_vision:
        return model, parameters
    frozen = [name for name in model.names if name.startswith(model.family.vision)]
    model._put({name: parameters.pop(name).astype(model.dtype) for name in frozen})
    return (_with_feature_cache(model) if frozen else model), parameters


def _adapters_trained(
    model: Model, options: ModelOptions, tensors: Mapping[str, mx.array]
) -> tuple[Model, Parameters]:
    """A model whose adapters alone are trained, over a base that may stand in 4 bits."""
    module, dtype = model.module, model.dtype
    frozen = {name: channels_last(tensors[original]) for name, original in model.names.items()}
    frozen = {
        name: value.astype(dtype) if mx.issubdtype(value.dtype, mx.floating) else value
        for name, value in frozen.items()
    }
    module.update(tree_unflatten(list(frozen.items())))
    linear = linear_layers(module, model.names)
    if options.four_bit:
        language = {
            path for k, (path, _) in linear.items() if adapters.part_of_model(k) == "language"
        }
        four_bits(module, language)
    parameters, trained = add_adapters(module, options, linear)
    model = replace(
        model,
        # Anew: quantised and adapted modules took the place of those that were there.
        layers=model.family.layers(module, model.config, model.device),
        names={**model.names, **trained},
        frozen_head=frozen[model.head_name],
    )
    visible = any(
        adapters.part_of_model(name) in ("vision", "projector") for name in trained.values()
    )
    return (model if visible else _with_feature_cache(model)), parameters


def _with_feature_cache(model: Model) -> Model:
    cache = FeatureCache(model.features, model.device.feature_bytes)
    return replace(model, feature_cache=cache)


def _used(
    config: Mapping[str, Any], stored: Mapping[str, mx.array], folder: Path
) -> tuple[dict[str, mx.array], bool]:
    """Tensors that a forward reads, by their names in transformers' module, and whether weights
    are tied.

    transformers decides that so too: a head that the files hold beside the embedding, and that
    differs from it, is the head.
    """
    older = names.used(config["model_type"], stored, folder)
    tied = bool(config["tie_word_embeddings"])
    if tied:
        older = names.with_tie(config["model_type"], older)
    used = {name: stored[old] for name, old in older.items()}
    if not tied:
        return used, False
    head = {name: value for name, value in used.items() if name.startswith("lm_head.")}
    embedding = next(
        (name.removesuffix("weight") for name in used if name.endswith("embed_tokens.weight")), ""
    )
    same = all(
        _equal(value, used.get(embedding + name.removeprefix("lm_head.")))
        for name, value in head.items()
    )
    return {name: value for name, value in used.items() if not (same and name in head)}, same


def _equal(one: mx.array, other: mx.array | None) -> bool:
    return other is not None and one.shape == other.shape and bool(mx.array_equal(one, other))
