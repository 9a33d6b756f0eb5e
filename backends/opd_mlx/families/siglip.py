"""The SigLIP tower, which Gemma 3 and Idefics3 share.

It has learned positions and full attention within an image or tile. mlx-vlm's forward differs: its
last norm has another epsilon, and rows attend to padding.

Legend: m images of one size, L patches of an image, D width of the tower.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Prompt
from opd_mlx.device import Device
from opd_mlx.kernels.activations import gelu
from opd_mlx.layers.attention import attend
from opd_mlx.layers.layer import checkpoint_if
from opd_mlx.layers.modules import Map


class _Attention(Protocol):
    num_heads: int
    scale: float
    q_proj: Map
    k_proj: Map
    v_proj: Map
    out_proj: Map


class _FeedForward(Protocol):
    fc1: Map
    fc2: Map


class _Layer(Protocol):
    layer_norm1: Map
    layer_norm2: Map
    self_attn: _Attention
    mlp: _FeedForward


def encode(
    tower: Any,
    pixels: NDArray[np.generic],
    positions: NDArray[np.int32],
    device: Device,
    recompute: float,
    real: NDArray[np.int32] | None = None,
) -> mx.array:
    """Hidden states [m, L, D] of `pixels` [m, 3, height, width].

    `positions` [L] are the patches' rows in the table of positions. `real` has the indices of
    patches that are not padding; None if there is no padding.
    """
    kernel: mx.array = tower.embeddings.patch_embedding.weight
    side = kernel.shape[1]
    count, colours, height, width = pixels.shape
    # The kernel [D, side, side, colours] is as large as a patch, so one matrix product computes it.
    cut = pixels.reshape(count, colours, height // side, side, width // side, side)
    cut = np.ascontiguousarray(cut.transpose(0, 2, 4, 3, 5, 1))
    patches = mx.array(cut.reshape(count, len(positions), -1)).astype(kernel.dtype)
    bias: mx.array = tower.embeddings.patch_embedding.bias
    hidden = patches @ kernel.reshape(len(kernel), -1).T + bias
    hidden = hidden + tower.embeddings.position_embedding(mx.array(positions))
    keys = None if real is None else mx.array(real)
    layers: list[_Layer] = tower.encoder.layers
    for number, layer in enumerate(layers):

        def run(hidden: mx.array, layer: _Layer = layer) -> mx.array:
            normalised = layer.layer_norm1(hidden)
            hidden = hidden + _attention(layer.self_attn, normalised, keys, device)
            return hidden + layer.mlp.fc2(gelu(layer.mlp.fc1(layer.layer_norm2(hidden))))

        hidden = checkpoint_if(number < recompute * len(layers), layer, run)(hidden)
    out: mx.array = tower.post_layernorm(hidden)
    return out


def patches(config: Mapping[str, Any], prompt: Prompt) -> list[tuple[int, int]]:
    """The pair (images, patches of each) of a prompt, whose images run together."""
    pixels = prompt.images.get("pixel_values", np.zeros((0, 0, 0, 0)))
    count, _, height, width = pixels.shape
    return [(count, height * width // config["vision_config"]["patch_size"] ** 2)]


def _attention(
    attention: _Attention, hidden: mx.array, keys: mx.array | None, device: Device
) -> mx.array:
    seen = hidden if keys is None else hidden[:, keys]
    query, key, value = (
        rows.reshape(*rows.shape[:2], attention.num_heads, -1).swapaxes(1, 2)
        for rows in (attention.q_proj(hidden), attention.k_proj(seen), attention.v_proj(seen))
    )
    mixed = attend(query, key, value, attention.scale, device)
    return attention.out_proj(mixed.swapaxes(1, 2).reshape(hidden.shape))
