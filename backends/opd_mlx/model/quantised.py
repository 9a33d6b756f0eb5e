"""Frozen weights in few bits: 4-bit bases for adapters, and checkpoints that are stored so.

The mlx-community has such checkpoints. A quantised layer is stored as `weight` (packed), `scales`
and `biases`; config.json says how under `quantization`, and for single layers under their path in
it. Embedding and head are dequantised once: the divergence reads the whole head at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

BITS = 4

GROUPS = (64, 32)
"""Weights that share a scale, if the width divides by so many; a layer of another width stays."""

TABLES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's layers are quantised: group size, bits and mode.

    `default` is for all layers, `exceptions` for single layers by Hugging Face name.
    """

    default: Mapping[str, Any]
    exceptions: Mapping[str, Mapping[str, Any]]

    def of(self, layer: str) -> dict[str, Any]:
        """What `mx.dequantize` and `to_quantized` take for a layer."""
        return {**self.default, **self.exceptions.get(layer, {})}


def quantisation(config: Mapping[str, Any], rename: Callable[[str], str]) -> Quantisation | None:
    """The checkpoint's quantisation, or None; `rename` gives Hugging Face names to MLX's."""
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
    """`tensors` by Hugging Face name with plain weights; `tables`: embedding and head alone."""
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
    """Makes those layers of `module` quantised ones whose scales are among `tensors`."""
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
