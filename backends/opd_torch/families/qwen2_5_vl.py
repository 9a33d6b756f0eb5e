"""Qwen2.5-VL: projections with biases, mRoPE in chunks, a tower that attends within windows in most blocks.

Legend: m images of one size, L patches of an image, F values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from opd.types import Prompt
from opd_torch.families.decoder import Decoder
from opd_torch.families.qwen3_vl import QwenVision, block, embed, frames
from opd_torch.kernels.rotary import turns
from opd_torch.vision import Size, computed, visual_features


class Qwen25VL(QwenVision, Decoder):
    """See `opd_torch.families.Family`."""

    model_types = ("qwen2_5_vl",)
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def features(self, model: Any, prompts: Sequence[Prompt], again: float) -> list[Tensor]:
        """Features of all visual tokens."""
        visual = model.model.visual
        device = visual.patch_embed.proj.weight.device
        return visual_features(
            prompts, lambda prompt: frames(prompt, visual), lambda patches, size: _tower(visual, patches, size, again), device
        )


def _tower(visual: Any, patches: Tensor, size: Size, again: float) -> list[Tensor]:
    """Merged features [m, L / merge^2, width] of `patches` [m, L, ...].

    Patches stand window by window, windows of equal length together, so that each length is one batch. No block sees the order.
    """
    merge = visual.spatial_merge_size
    order, windows = _windows(size, merge, visual.window_size // merge // visual.patch_size)
    order = order.to(patches.device)
    hidden = embed(visual, patches[:, order])
    places = get_vision_position_ids(torch.tensor([[1, *size]]), merge).to(patches.device)
    angles = turns(*(x[order, None, None] for x in visual.rotary_pos_emb(hidden, places)))
    for number, layer in enumerate(visual.blocks):
        cut = () if number in visual.fullatt_block_indexes else windows
        hidden = computed(number < again * len(visual.blocks), block, layer, hidden, angles, cut)
    merged = visual.merger(hidden).view(len(patches), -1, visual.merger.mlp[-1].out_features)
    return [merged.index_select(1, (order[:: merge**2] // merge**2).argsort())]


@lru_cache(maxsize=256)
def _windows(size: Size, merge: int, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """Order [L] of an image's patches by windows of side x side visual tokens, and (how many, patches of each) of each length.

    The merge x merge patches of a visual token stand together, as they are given.
    """
    row, column = np.divmod(np.arange(size[0] * size[1] // merge**2), size[1] // merge)
    window = row // side * (size[1] // merge) + column // side
    _, its, lengths = np.unique(window, return_inverse=True, return_counts=True)
    order = np.lexsort((window, lengths[its]))
    found, many = np.unique(lengths, return_counts=True)
    patches = (order[:, None] * merge**2 + np.arange(merge**2)).ravel()
    return torch.from_numpy(patches), [(int(count), int(length) * merge**2) for length, count in zip(found, many, strict=True)]
