"""Puts low-rank adapters as mlx-lm's layers into mlx-vlm's modules, and merges adapters into
weights.

mlx-lm stores A as [in, r] and B as [r, out]; `transposed` converts to PEFT's layout and back.
`opd.models.adapters` has what both backends share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx import nn
from mlx.utils import tree_unflatten

from opd.models import adapters, peft_files
from opd.types import FloatArray, ModelOptions

SIDES = {".lora_a": adapters.A, ".lora_b": adapters.B}
"""PEFT's endings of the names of an adapter's tensors, by mlx-lm's endings."""

LinearLayers: TypeAlias = Mapping[str, tuple[str, tuple[int, int]]]
"""The path in the module and the shape (out, in) of every linear layer, by Hugging Face name."""


def linear_layers(module: Any, names: Mapping[str, str]) -> LinearLayers:
    """Every linear layer of `module`; `names` maps MLX names of parameters to Hugging Face's."""
    layers = {}
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear | nn.QuantizedLinear):
            out, width = layer.weight.shape
            if isinstance(layer, nn.QuantizedLinear):
                width = width * 32 // layer.bits
            layers[names[f"{path}.weight"].removesuffix(".weight")] = path, (out, width)
    return layers


def add_adapters(
    module: Any, options: ModelOptions, layers: LinearLayers
) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Puts adapters into the module, and freezes everything else.

    Returns the adapters' float32 values, and their Hugging Face names, by MLX name.
    """
    from mlx_lm.tuner.lora import LoRALinear

    assert options.adapters is not None
    rank, scale = options.adapters.rank, options.adapters.scale
    values = peft_files.initial_adapters(
        options, {name: shape for name, (_, shape) in layers.items()}
    )
    modules = dict(module.named_modules())
    wrapped, parameters, names = [], {}, {}
    for name in adapters.adapted_layers(values):
        path = layers[name][0]
        wrapped.append((path, LoRALinear.from_base(modules[path], r=rank, scale=scale)))
        for ours, theirs in SIDES.items():
            names[path + ours] = name + theirs
            parameters[path + ours] = transposed(name + theirs, mx.array(values[name + theirs]))
    module.update_modules(tree_unflatten(wrapped))
    # A checkpointed layer computes gradients of all parameters that are not frozen, and quantised
    # weights have no gradient.
    module.freeze()
    for _, layer in wrapped:
        layer.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    return parameters, names


def transposed(name: str, value: mx.array) -> mx.array:
    """Converts a tensor between mlx-lm's layout and PEFT's, in either direction; `name` is PEFT's.

    A and B of an adapter are transposed, other tensors stay as they are.
    """
    return mx.contiguous(value.T) if name.endswith((adapters.A, adapters.B)) else value


def merge(
    tensors: Mapping[str, mx.array], adapter: Mapping[str, FloatArray], scale: float
) -> dict[str, mx.array]:
    """Adds scale * B A of the `adapter` in float32 to `tensors`, which go by Hugging Face name."""
    merged = dict(tensors)
    for name, change in adapters.merged_updates(adapter, scale):
        added = mx.array(np.ascontiguousarray(change))
        merged[name] = merged[name].astype(mx.float32) + added
    return merged


def merge_adapter(
    options: ModelOptions, tensors: Mapping[str, mx.array], layers: LinearLayers | None = None
) -> Mapping[str, mx.array]:
    """Merges the adapter that the options name into the stored `tensors`.

    Raises ModelError or RecipeError if the adapter does not fit `layers`.
    """
    if options.adapter is None:
        return tensors
    if layers is None:
        adapter = peft_files.read(options.adapter, peft_files.model_type(options.path))
    else:
        shapes = {name: shape for name, (_, shape) in layers.items()}
        adapter = peft_files.fitting(options, shapes)
    return merge(tensors, adapter.tensors, adapter.alpha / adapter.rank)
