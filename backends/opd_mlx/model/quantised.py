"""Frozen weights in few bits: 4-bit bases for adapters, and checkpoints that are stored so, as the mlx-community has them.

A quantised layer is stored as `weight` (packed), `scales` and `biases`; config.json says how under `quantization`, and for single layers
under their path in it. Embedding and head are dequantised once: the divergence reads the whole head at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx import nn

BITS = 4
GROUPS = (64, 32)
"""Weights that share a scale, where the width divides by so many; a layer of another width stays as it is."""

TABLES = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class Quantisation:
    """How a checkpoint's layers are quantised: group size, bits and mode of `default`, and of single layers by Hugging Face name."""

    default: Mapping[str, Any]
    own: Mapping[str, Mapping[str, Any]]

    def of(self, layer: str) -> dict[str, Any]:
        """What `mx.dequantize` and `to_quantized` take for a layer."""
        return {**self.default, **self.own.get(layer, {})}


def quantisation(config: Mapping[str, Any], rename: Callable[[str], str]) -> Quantisation | None:
    """The checkpoint's quantisation, or None; `rename` gives Hugging Face names to MLX's."""
    stored = config.get("quantization")
    if not stored:
        return None
    own = {rename(f"{path}.weight").removesuffix(".weight"): value for path, value in stored.items() if isinstance(value, dict)}
    return Quantisation({name: value for name, value in stored.items() if name in ("group_size", "bits", "mode")}, own)


def dequantised(tensors: Mapping[str, mx.array], stored: Quantisation | None, tables: bool = False) -> dict[str, mx.array]:
    """`tensors` by Hugging Face name with plain weights, of all layers or of embedding and head alone (`tables`)."""
    plain = dict(tensors)
    for layer in [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")] if stored else []:
        if tables and layer.rpartition(".")[2] not in TABLES:
            continue
        assert stored is not None
        scales, biases = plain.pop(f"{layer}.scales"), plain.pop(f"{layer}.biases", None)
        plain[f"{layer}.weight"] = mx.dequantize(plain[f"{layer}.weight"], scales, biases, **stored.of(layer))
    return plain


def quantise_alike(module: Any, tensors: Collection[str], stored: Quantisation | None, rename: Callable[[str], str]) -> None:
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
        group = next((group for group in GROUPS if layer.weight.shape[-1] % group == 0), None) if path in paths else None
        return group is not None and not isinstance(layer, nn.QuantizedLinear) and {"group_size": group, "bits": BITS}

    nn.quantize(module, class_predicate=how)
