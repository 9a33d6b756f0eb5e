"""Qwen3-VL: norms on keys and queries; a tower whose middle layers feed the first layers of the text (deepstack).

Legend: m images of one size, L patches of an image, F values of a patch, D vision width, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from opd.types import Prompt
from opd_torch.families.decoder import NormedDecoder
from opd_torch.kernels.pointwise import feed_forward
from opd_torch.kernels.rotary import rotated_heads, turns
from opd_torch.vision import Frames, Size, computed, visual_features


class QwenVision:
    """Towers that take packed patches of any image size, cut by `image_grid_thw`."""

    def vision(self, model: Any) -> list[Any]:
        """The tower; its merger is the projector."""
        return [model.model.visual]

    def patches(self, prompt: Prompt, model: Any) -> int:
        """Rows of `pixel_values`."""
        return len(prompt.images["pixel_values"]) if prompt.images else 0


class Qwen3VL(QwenVision, NormedDecoder):
    """See `opd_torch.families.Family`."""

    model_types = ("qwen3_vl",)
    architecture = "Qwen3VLForConditionalGeneration"

    def features(self, model: Any, prompts: Sequence[Prompt], again: float) -> list[Tensor]:
        """Features of all visual tokens, and those of each deepstack layer."""
        visual = model.model.visual
        return visual_features(
            prompts,
            lambda prompt: frames(prompt, visual),
            lambda patches, size: _tower(visual, patches, size, again),
            visual.pos_embed.weight.device,
        )


def frames(prompt: Prompt, visual: Any) -> Frames:
    """Size, and patches [L, F], of every frame of a prompt's images; attention never leaves a frame.

    A patch shows several moments, and of a still image they are all alike: then one is left, [L, channels, F / moments / channels], and
    not copied before images are put together.
    """
    sizes = [(rows, columns) for times, rows, columns in prompt.images["image_grid_thw"].tolist() for _ in range(times)]
    cuts = np.cumsum([rows * columns for rows, columns in sizes])[:-1]
    channels, moments = visual.patch_embed.in_channels, visual.patch_embed.temporal_patch_size
    found: Frames = []
    for size, patches in zip(sizes, np.split(prompt.images["pixel_values"], cuts), strict=True):
        cut = patches.reshape(len(patches), channels, moments, -1)
        still = all(np.array_equal(cut[:, :, 0], cut[:, :, moment]) for moment in range(1, moments))
        found.append((size, cut[:, :, 0] if still else patches))
    return found


def _tower(visual: Any, patches: Tensor, size: Size, again: float) -> list[Tensor]:
    """Merged features [m, L / merge^2, width] of `patches` [m, L, ...], and those of each deepstack layer."""
    taps, weights, places = (x.to(patches.device) for x in _grid(size, visual.num_grid_per_side, visual.spatial_merge_size))
    hidden = embed(visual, patches)
    positions = (visual.pos_embed(taps) * weights[:, :, None]).sum(1)
    hidden = hidden + positions.to(hidden.dtype)
    angles = turns(*(x[:, None, None] for x in visual.rotary_pos_emb(hidden, places)))
    taken = list(getattr(visual, "deepstack_visual_indexes", ()))
    levels = []
    for number, layer in enumerate(visual.blocks):
        hidden = computed(number < again * len(visual.blocks), block, layer, hidden, angles)
        if number in taken:
            levels.append(visual.deepstack_merger_list[taken.index(number)](hidden))
    return [level.view(len(patches), -1, level.shape[-1]) for level in [visual.merger(hidden), *levels]]


def embed(visual: Any, patches: Tensor) -> Tensor:
    """Embeddings [m, L, D] of `patches` [m, L, ...]: the convolution's kernel is as large as a patch, so it is one matrix product."""
    projection, patches = visual.patch_embed.proj, patches.flatten(2)
    weight = projection.weight
    kernel = weight if weight[0].numel() == patches.shape[-1] else weight.sum(2)  # of a moment that stands for all
    return linear(patches.to(weight.dtype), kernel.flatten(1), projection.bias)


def block(layer: Any, hidden: Tensor, angles: Tensor, windows: Sequence[tuple[int, int]] = ()) -> Tensor:
    """One transformer block on `hidden` [m, L, D]. `angles` [L, 1, 1, d / 2] of head width d.

    Attention is within each image, or within each of its `windows`: so many, of so many patches, standing one after the other.
    """
    attention = layer.attn
    packed = attention.qkv(layer.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1))
    # Queries and keys are turned in float32 and rounded then, as transformers does it.
    heads = rotated_heads(packed, angles)
    if windows:
        parts = zip(*(x.split([count * length for count, length in windows], 1) for x in heads), strict=True)
        cut = [[x.unflatten(1, window).flatten(0, 1) for x in part] for part, window in zip(parts, windows, strict=True)]
        mixed = torch.cat([_mix(part, attention.scaling).unflatten(0, (len(hidden), -1)).flatten(1, 2) for part in cut], 1)
    else:
        mixed = _mix(heads, attention.scaling)
    hidden = hidden + attention.proj(mixed.flatten(2))
    return hidden + feed_forward(layer.mlp, layer.norm2(hidden))


def _mix(heads: Sequence[Tensor], scaling: float) -> Tensor:
    """Attention among the second axis of queries, keys and values [m, L, H, d]."""
    query, key, value = (x.transpose(1, 2) for x in heads)
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2)


@lru_cache(maxsize=256)
def _grid(size: Size, side: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each patch of an image: its four neighbours in the table of positions, their weights, and its row and column."""
    grid = torch.tensor([[1, *size]])
    taps, weights = get_vision_interpolation_indices_and_weights(grid, side, align_corners=True, spatial_merge_size=merge)
    return taps, weights, get_vision_position_ids(grid, merge)
