"""The vision tower of Qwen3-VL over images of one size at a time, batched; equal to transformers' image by image.

Legend: m images of one size, L patches of an image, F values of a patch, D vision width, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from opd.types import Prompt

Size: TypeAlias = tuple[int, int]
"""Rows and columns of patches."""


KNOWN_BYTES = 2**30
"""Features of a frozen tower that are kept, of all prompts together."""


def visual_features(visual: Any, prompts: Sequence[Prompt], again: bool = False) -> list[Tensor]:
    """Features [S, width] of all visual tokens in the order of `prompts`: for the embeddings, then for each deepstack layer.

    Prompts of equal key are computed once. Empty where no prompt has an image. `again` computes blocks again in the backward.
    """
    images: dict[Size, list[NDArray[np.generic]]] = {}
    places: dict[str, list[tuple[Size, int]]] = {}
    for prompt in prompts:
        if prompt.key not in places and len(prompt.visual.index):
            places[prompt.key] = []
            for size, patches in _frames(prompt):
                members = images.setdefault(size, [])
                places[prompt.key].append((size, len(members)))
                members.append(patches)
    device = visual.pos_embed.weight.device
    outputs = {size: _tower(visual, torch.from_numpy(np.stack(members)).to(device), size, again) for size, members in images.items()}
    wanted = [place for prompt in prompts if len(prompt.visual.index) for place in places[prompt.key]]
    if not wanted:
        return []
    levels = range(1 + len(visual.deepstack_merger_list))
    if len(images) == 1 and [place for _, place in wanted] == list(range(len(images[wanted[0][0]]))):
        return [outputs[wanted[0][0]][level].flatten(0, 1) for level in levels]
    return [torch.cat([outputs[size][level][place] for size, place in wanted]) for level in levels]


class KnownFeatures:
    """Features of a frozen tower, by the prompt's key: computed once for rollout, student and teacher."""

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self._levels: dict[str, list[Tensor]] = {}

    def features(self, prompts: Sequence[Prompt]) -> list[Tensor]:
        """What `visual_features` gives, from memory where it is there; the oldest are forgotten above KNOWN_BYTES."""
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        new = [prompt for key, prompt in wanted.items() if key not in self._levels]
        counts = [len(prompt.visual.index) for prompt in new]
        cut = [level.split(counts) for level in visual_features(self._visual, new)]
        found = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        found |= {prompt.key: list(levels) for prompt, levels in zip(new, zip(*cut, strict=True), strict=True)}
        self._levels |= found
        spare = sum(level.nbytes for levels in self._levels.values() for level in levels) - KNOWN_BYTES
        for key in [key for key in self._levels if key not in wanted]:
            if spare > 0:
                spare -= sum(level.nbytes for level in self._levels.pop(key))
        each = [found[prompt.key] for prompt in prompts if prompt.key in found]
        return [torch.cat(level) for level in zip(*each, strict=True)]


def _frames(prompt: Prompt) -> list[tuple[Size, NDArray[np.generic]]]:
    """Size, and patches [L, F], of every frame of a prompt's images; attention never leaves a frame."""
    sizes = [(rows, columns) for frames, rows, columns in prompt.images["image_grid_thw"].tolist() for _ in range(frames)]
    cuts = np.cumsum([rows * columns for rows, columns in sizes])[:-1]
    return list(zip(sizes, np.split(prompt.images["pixel_values"], cuts), strict=True))


def _tower(visual: Any, patches: Tensor, size: Size, again: bool) -> list[Tensor]:
    """Merged features [m, L / merge^2, width] of `patches` [m, L, F], and those of each deepstack layer."""
    taps, weights, places = (x.to(patches.device) for x in _grid(size, visual.num_grid_per_side, visual.spatial_merge_size))
    projection = visual.patch_embed.proj
    # The convolution's kernel is as large as a patch, so it is one matrix product.
    hidden = linear(patches.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
    positions = (visual.pos_embed(taps) * weights[:, :, None]).sum(1)
    hidden = hidden + positions.to(hidden.dtype)
    angles = [x[:, None, None] for x in visual.rotary_pos_emb(hidden, places)]
    levels = []
    for number, block in enumerate(visual.blocks):
        if again and torch.is_grad_enabled():
            hidden = checkpoint(_block, block, hidden, *angles, use_reentrant=False)
        else:
            hidden = _block(block, hidden, *angles)
        if number in visual.deepstack_visual_indexes:
            levels.append(visual.deepstack_merger_list[list(visual.deepstack_visual_indexes).index(number)](hidden))
    return [level.view(len(patches), -1, level.shape[-1]) for level in [visual.merger(hidden), *levels]]


def _block(block: Any, hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """One transformer block on `hidden` [m, L, D]; attention within each image. `cosines`, `sines` [L, 1, 1, d] of head width d."""
    attention = block.attn
    rotated, value = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, attention.num_heads, -1)).split([2, 1], 2)
    # Queries and keys in one go; in float32 and in this order of operations, as transformers rotates and rounds them.
    wide = rotated.float()
    first, second = wide.chunk(2, -1)
    rotated = (wide * cosines + torch.cat([-second, first], -1) * sines).to(value.dtype)
    query, key, value = (x.transpose(1, 2) for x in (*rotated.unbind(2), value[:, :, 0]))
    mixed = scaled_dot_product_attention(query, key, value, scale=attention.scaling)
    hidden = hidden + attention.proj(mixed.transpose(1, 2).flatten(2))
    out: Tensor = hidden + block.mlp(block.norm2(hidden))
    return out


@lru_cache(maxsize=256)
def _grid(size: Size, side: int, merge: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each patch of an image: its four neighbours in the table of positions, their weights, and its row and column."""
    grid = torch.tensor([[1, *size]])
    taps, weights = get_vision_interpolation_indices_and_weights(grid, side, align_corners=True, spatial_merge_size=merge)
    return taps, weights, get_vision_position_ids(grid, merge)
