"""Reads model folders in Hugging Face layout into mlx-vlm's modules.

Trained parameters are not in the modules but in flat dictionaries by MLX name; `Model.bound` puts
them into the modules during a computation.
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
    """A model: `module` is mlx-vlm's model, which holds the frozen parameters, and `layers` run the
    module's trunk.

    `config` is config.json, completed by transformers. `names` maps MLX names to Hugging Face's.
    `tied` says whether the embedding is the head. `dtype` is the type of computation.
    `feature_cache` caches image features, and is None if vision is trained. `frozen_head` is the
    head if it is not trained.
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
        """The name of the head's parameter, which is the embedding's for a tied head."""
        ending = "embed_tokens.weight" if self.tied else "lm_head.weight"
        return next(name for name in self.names if name.endswith(ending))

    @property
    def embedding_name(self) -> str:
        """The name of the embedding's parameter."""
        return next(name for name in self.names if name.endswith("embed_tokens.weight"))

    @property
    def vocabulary(self) -> int:
        """The number of rows of the embedding."""
        return int(self.config["text_config"]["vocab_size"])

    def head(self, parameters: Parameters) -> mx.array:
        """The head [V, D], in float32, or in the compute dtype if it is frozen."""
        return parameters[self.head_name] if self.frozen_head is None else self.frozen_head

    def features(self, prompts: Sequence[Prompt], recompute: float = 0) -> list[mx.array]:
        """The image features of `prompts` by level, through the feature cache if there is one."""
        if self.feature_cache is not None:
            return self.feature_cache.features(prompts)
        return self.family.features(self.module, prompts, self.device, recompute)

    @contextmanager
    def bound(self, parameters: Parameters) -> Iterator[None]:
        """A context in which the module computes with `parameters`, cast to the compute dtype."""
        self._put({name: value.astype(self.dtype) for name, value in parameters.items()})
        try:
            yield
        finally:  # otherwise the module would keep traced arrays and copies alive
            nothing = mx.array(0.0)
            self._put(dict.fromkeys(parameters, nothing))

    def to_hugging_face(self, parameters: Parameters) -> dict[str, mx.array]:
        """Converts `parameters` to Hugging Face's names and layouts."""
        return {
            self.names[name]: transposed(self.names[name], channels_second(value))
            for name, value in parameters.items()
        }

    def _put(self, parameters: Parameters) -> None:
        self.module.update(tree_unflatten(list(parameters.items())))


def load_model(options: ModelOptions, device: Device) -> tuple[Model, Parameters]:
    """Loads the model of a folder. Also returns the trained parameters in float32: those of the
    adapters, or all of them, with the vision tower's only if `tune_vision`.

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
        pass  # this drops the random weights that the module was made with
    mx.eval(parameters, module.parameters())
    broken = not_finite(model, parameters)
    if broken:
        raise holds_nan(model.folder, broken)
    return model, parameters


def not_finite(model: Model, parameters: Parameters) -> str | None:
    """The Hugging Face name of a parameter with NaN or infinity in it; None if all are finite."""
    held = {**dict(tree_flatten(model.module.parameters())), **parameters}
    floats = {k: value for k, value in held.items() if mx.issubdtype(value.dtype, mx.floating)}
    # The sum is the fastest test, but a sum of large finite numbers may be infinite.
    sums = {name: value.sum() for name, value in floats.items()}
    mx.eval(sums)
    for name, total in sums.items():
        if not np.isfinite(total.item()) and not mx.isfinite(floats[name]).all().item():
            plain = name.replace(".linear.", ".")  # mlx-lm inserts this in adapted layers
            return str(model.names.get(plain, plain))
    return None


def read_config(folder: Path) -> dict[str, Any]:
    """Reads the config.json of a supported architecture, with every default of transformers.

    Raises ModelError.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder")
    if not path.is_file():
        raise ModelError(f"{folder}: no config.json, so this is not a model folder")
    config = read_json(path)
    try:
        family(str(config.get("model_type")))
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if not isinstance(config.get("vision_config"), dict):
        raise ModelError(f"{path}: no vision_config")
    from transformers import AutoConfig

    try:
        # transformers would misread the settings of MLX's quantisation.
        read = AutoConfig.for_model(**weight_formats.without_quantisation(config))
        completed, plain = read.to_dict(), settings.defaults(read)
        settings.check(completed, plain, config, path, "mlx", "cpu")
        # mlx-vlm's classes would read keys that transformers ignores.
        known = settings.without_unknown(completed, plain)
        return {**known, "quantization": weight_formats.mlx_settings(config)}
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError) as error:
        raise ModelError(f"{path} cannot be used: {one_line(error)}") from error


def stored_tensors(folder: Path, kind: Family) -> dict[str, mx.array]:
    """All tensors of the folder's safetensors files by Hugging Face name. MLX reads them from disk
    when they are evaluated.

    Raises ModelError.
    """
    try:
        tensors: dict[str, mx.array] = {}
        for file in weight_files(folder):
            loaded = mx.load(str(folder / file), return_metadata=True)
            part, metadata = cast("tuple[dict[str, mx.array], dict[str, str]]", loaded)
            if metadata.get("format") == "mlx":
                # mlx-vlm saved it, with MLX's names and layouts, and with 1 added to some norms.
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
    """Sets up a model whose parameters are all trained, or all but the vision tower's."""
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
    """Sets up a model whose adapters are trained, over a base that may be in 4 bits."""
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
        # New layers, because quantised and adapted modules have replaced the old ones.
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
    """The tensors that a forward reads, by name in transformers' module, and whether the head is
    tied.

    As in transformers, a stored head that differs from the embedding is used even if config.json
    says that the head is tied.
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


def _equal(a: mx.array, b: mx.array | None) -> bool:
    return b is not None and a.shape == b.shape and bool(mx.array_equal(a, b))
