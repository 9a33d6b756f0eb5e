"""4-bit base models for adapters, and checkpoints that are stored quantised, as in mlx-community.

A quantised layer is stored as `weight` (packed), `scales` and `biases`. config.json describes the
quantisation under `quantization`, and that of single layers there under the layer's path. Embedding
and head are dequantised on loading, because the divergence reads the whole head at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

BITS = 4

GROUPS = (64, 32)
"""Numbers of weights that share a scale. The first that divides a layer's width is used; a layer
of another width stays as it is."""

TABLES = ("embed_tokens", "lm_head")
"""Layers that are dequantised on loading."""


@dataclass(frozen=True)
class Quantisation:
    """A checkpoint's quantisation: group size, bits and mode.

    `default` is that of all layers, `exceptions` that of single layers by Hugging Face name.
    """

    default: Mapping[str, Any]
    exceptions: Mapping[str, Mapping[str, Any]]

    def of(self, layer: str) -> dict[str, Any]:
        """The arguments of `mx.dequantize` and `to_quantized` for a layer."""
        return {**self.default, **self.exceptions.get(layer, {})}


def quantisation(config: Mapping[str, Any], rename: Callable[[str], str]) -> Quantisation | None:
    """The checkpoint's quantisation, or None; `rename` maps MLX names to Hugging Face's."""
    stored = config.get("quantization")
    if not stored:
        return None
    default = {k: value for k, value in stored.items() if k in ("group_size", "bits", "mode")}
    exceptions = {
        rename(f"{path}.weight").removesuffix(".weight"): value
        for path, value in stored.items()
        if isinstance(value, dict)
    }
    return Quantisation(default, exceptions)


def dequantised(
    tensors: Mapping[str, mx.array], stored: Quantisation | None, tables: bool = False
) -> dict[str, mx.array]:
    """Dequantises `tensors` by Hugging Face name; with `tables` only the embedding and the head."""
    plain = dict(tensors)
    if stored is None:
        return plain
    for layer in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]:
        if tables and layer.rpartition(".")[2] not in TABLES:
            continue
        scales, biases = plain.pop(f"{layer}.scales"), plain.pop(f"{layer}.biases", None)
        packed = plain[f"{layer}.weight"]
        plain[f"{layer}.weight"] = mx.dequantize(packed, scales, biases, **stored.of(layer))
    return plain


def quantise_alike(
    module: Any,
    tensors: Collection[str],
    stored: Quantisation | None,
    rename: Callable[[str], str],
) -> None:
    """Replaces the layers of `module` whose scales are among `tensors` by quantised ones."""
    if stored is None:
        return

    def how(path: str, layer: Any) -> bool | dict[str, Any]:
        name = rename(f"{path}.weight").removesuffix(".weight")
        return f"{name}.scales" in tensors and hasattr(layer, "to_quantized") and stored.of(name)

    nn.quantize(module, class_predicate=how)


def four_bits(module: Any, paths: Collection[str]) -> None:
    """Quantises the linear layers at `paths` to 4 bits."""

    def how(path: str, layer: Any) -> bool | dict[str, Any]:
        if path not in paths or isinstance(layer, nn.QuantizedLinear):
            return False
        width = layer.weight.shape[-1]
        group = next((group for group in GROUPS if width % group == 0), None)
        return group is not None and {"group_size": group, "bits": BITS}

    nn.quantize(module, class_predicate=how)
