"""Qwen3-VL: norms on keys and queries, and a tower whose middle layers feed the first layers of the
language trunk (deepstack).

Legend: m images of one size, L patches of an image, F values of a patch, D width of the tower, S
visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from opd.types import Prompt
from opd_torch.device import Device
from opd_torch.families.decoder import Decoder
from opd_torch.kernels.pointwise import feed_forward
from opd_torch.kernels.rotary import rotary_factors, rotated_heads
from opd_torch.layers.attention import NormedHeads
from opd_torch.layers.layer import checkpoint_if
from opd_torch.layers.modules import FeedForward, Map
from opd_torch.vision import ImageBatch, Size, visual_features


class VisionAttention(Protocol):
    """The parts of a vision tower's attention, by transformers' names."""

    num_heads: int
    scaling: float
    qkv: Map
    proj: Map


class VisionBlock(Protocol):
    """The parts of a vision tower's block, by transformers' names."""

    attn: VisionAttention
    norm1: Map
    norm2: Map
    mlp: FeedForward


class _Patches(Protocol):
    in_channels: int
    temporal_patch_size: int
    proj: nn.Conv3d


class VisionTower(Protocol):
    """The parts of Qwen's vision tower, by transformers' names; `rotary_pos_emb` computes cosines
    and sines.
    """

    spatial_merge_size: int
    patch_embed: _Patches
    rotary_pos_emb: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    blocks: Sequence[VisionBlock]
    merger: Map


class _Tower(VisionTower, Protocol):
    num_grid_per_side: int
    pos_embed: Map
    deepstack_merger_list: Sequence[Map]


class QwenVision:
    """The tower of the Qwen-VL families, which takes images of any size as packed patches."""

    def vision(self, module: Any) -> list[nn.Module]:
        """The tower; its merger is the projector."""
        return [module.model.visual]

    def patches(self, config: Any, prompt: Prompt) -> int:
        """The number of rows of `pixel_values`."""
        return len(prompt.images["pixel_values"]) if prompt.images else 0


class Qwen3VL(QwenVision, Decoder):
    """The family of Qwen3-VL."""

    model_types = ("qwen3_vl",)
    architecture = "Qwen3VLForConditionalGeneration"
    attention = NormedHeads

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float
    ) -> list[Tensor]:
        """The features of all visual tokens: of the merger, then of each deepstack layer."""
        visual: _Tower = module.model.visual
        return visual_features(
            prompts,
            lambda prompt: frames(prompt, visual),
            lambda patches, size: _tower(visual, patches, size, recompute),
            device,
        )


def frames(prompt: Prompt, visual: VisionTower) -> ImageBatch:
    """The size and the patches [L, F] of every frame of a prompt's images, since attention stays
    within a frame.

    A patch holds several moments. In a still image they are equal; then only the first is returned,
    [L, channels, F / moments / channels], as a view.
    """
    grid = prompt.images["image_grid_thw"].tolist()
    sizes = [(rows, columns) for times, rows, columns in grid for _ in range(times)]
    cuts = np.cumsum([rows * columns for rows, columns in sizes])[:-1]
    channels, moments = visual.patch_embed.in_channels, visual.patch_embed.temporal_patch_size
    images: ImageBatch = []
    for size, patches in zip(sizes, np.split(prompt.images["pixel_values"], cuts), strict=True):
        by_moment = patches.reshape(len(patches), channels, moments, -1)
        first = by_moment[:, :, 0]
        still = all(np.array_equal(first, by_moment[:, :, other]) for other in range(1, moments))
        images.append((size, first if still else patches))
    return images


def _tower(visual: _Tower, patches: Tensor, size: Size, recompute: float) -> list[Tensor]:
    """Features [m, L / merge^2, width] of `patches` [m, L, ...]: of the merger, then of each
    deepstack layer.
    """
    grid = _grid(size, visual.num_grid_per_side, visual.spatial_merge_size)
    corners, weights, places = (x.to(patches.device) for x in grid)
    hidden = embed(visual, patches)
    positions = (visual.pos_embed(corners) * weights[:, :, None]).sum(1)
    hidden = hidden + positions.to(hidden.dtype)
    cosines, sines = visual.rotary_pos_emb(hidden, places)
    angles = rotary_factors(*(x[:, None, None] for x in (cosines, sines)))
    deepstack = list(getattr(visual, "deepstack_visual_indexes", ()))
    levels = []
    for number, layer in enumerate(visual.blocks):
        recompute_block = number < recompute * len(visual.blocks)
        hidden = checkpoint_if(recompute_block, block, layer, hidden, angles)
        if number in deepstack:
            merger = visual.deepstack_merger_list[deepstack.index(number)]
            levels.append(merger(hidden))
    levels.insert(0, visual.merger(hidden))
    return [level.view(len(patches), -1, level.shape[-1]) for level in levels]


def embed(visual: VisionTower, patches: Tensor) -> Tensor:
    """Embeddings [m, L, D] of `patches` [m, L, ...]. The convolution's kernel is as large as a
    patch, so one matrix product computes it.
    """
    projection, patches = visual.patch_embed.proj, patches.flatten(2)
    kernel: Tensor = projection.weight
    if kernel[0].numel() != patches.shape[-1]:
        kernel = kernel.sum(2)  # all moments are equal
    return linear(patches.to(kernel.dtype), kernel.flatten(1), projection.bias)


def block(
    layer: VisionBlock, hidden: Tensor, angles: Tensor, windows: Sequence[tuple[int, int]] = ()
) -> Tensor:
    """Runs one block of the tower on `hidden` [m, L, D]; `angles` are [L, 1, 1, d / 2] for heads of
    width d.

    Rows attend to their image, or to their window: `windows` are pairs (windows, patches of each)
    in the order of rows.
    """
    attention = layer.attn
    packed = torch.unflatten(attention.qkv(layer.norm1(hidden)), -1, (3, attention.num_heads, -1))
    # Queries and keys rotate in float32 and are rounded afterwards, as in transformers.
    heads = rotated_heads(packed, angles)
    if windows:
        mixed = torch.cat(list(_within(heads, windows, attention.scaling)), 1)
    else:
        mixed = _mix(heads, attention.scaling)
    hidden = hidden + attention.proj(mixed.flatten(2))
    return hidden + feed_forward(layer.mlp, layer.norm2(hidden))


def _within(
    heads: Sequence[Tensor], windows: Sequence[tuple[int, int]], scaling: float
) -> Iterator[Tensor]:
    """Yields the result of attention within windows for each length of window, from queries, keys
    and values [m, L, H, d].
    """
    lengths = [count * length for count, length in windows]
    parts = zip(*(torch.split(x, lengths, 1) for x in heads), strict=True)
    for part, window in zip(parts, windows, strict=True):
        mixed = _mix([torch.unflatten(x, 1, window).flatten(0, 1) for x in part], scaling)
        yield torch.unflatten(mixed, 0, (len(heads[0]), -1)).flatten(1, 2)


def _mix(heads: Sequence[Tensor], scaling: float) -> Tensor:
    """Attention along the second axis of queries, keys and values [m, L, H, d]."""
    query, key, value = (x.transpose(1, 2) for x in heads)
    return scaled_dot_product_attention(query, key, value, scale=scaling).transpose(1, 2)


@lru_cache(maxsize=256)
def _grid(size: Size, side: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each patch of an image: four neighbouring entries of the table of positions, the weights
    of these entries, and the patch's row and column.
    """
    grid = torch.tensor([[1, *size]])
    corners, weights = get_vision_interpolation_indices_and_weights(
        grid, side, align_corners=True, spatial_merge_size=merge
    )
    return corners, weights, get_vision_position_ids(grid, merge)
