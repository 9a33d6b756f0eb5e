"""Qwen2.5-VL: projections with biases, and a tower whose blocks, except a few, attend within
windows.

Legend: m images of one size, L patches of an image, F values of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers.vision_utils import get_vision_position_ids

from opd.types import Prompt
from opd_torch.device import Device
from opd_torch.families.decoder import Decoder
from opd_torch.families.qwen3_vl import QwenVision, VisionTower, block, embed, frames
from opd_torch.kernels.rotary import rotary_factors
from opd_torch.layers.layer import checkpoint_if
from opd_torch.vision import Size, visual_features


class _Merger(Protocol):
    mlp: Sequence[Any]

    def __call__(self, rows: Tensor, /) -> Tensor: ...


class _Tower(VisionTower, Protocol):
    patch_size: int
    window_size: int
    fullatt_block_indexes: Sequence[int]
    merger: _Merger


class Qwen25VL(QwenVision, Decoder):
    """The family of Qwen2.5-VL."""

    model_types = ("qwen2_5_vl",)
    architecture = "Qwen2_5_VLForConditionalGeneration"

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float
    ) -> list[Tensor]:
        """Features of all visual tokens."""
        visual: _Tower = module.model.visual
        return visual_features(
            prompts,
            lambda prompt: frames(prompt, visual),
            lambda patches, size: _tower(visual, patches, size, recompute),
            device,
        )


def _tower(visual: _Tower, patches: Tensor, size: Size, recompute: float) -> list[Tensor]:
    """Merged features [m, L / merge^2, width] of `patches` [m, L, ...].

    Patches are reordered window by window, with windows of equal length together, so that each
    length is one batch. The blocks' results do not depend on the order.
    """
    merge = visual.spatial_merge_size
    order, windows = _windows(size, merge, visual.window_size // merge // visual.patch_size)
    order = order.to(patches.device)
    hidden = embed(visual, patches[:, order])
    places = get_vision_position_ids(torch.tensor([[1, *size]]), merge).to(patches.device)
    cosines, sines = visual.rotary_pos_emb(hidden, places)
    angles = rotary_factors(*(x[order, None, None] for x in (cosines, sines)))
    for number, layer in enumerate(visual.blocks):
        full = number in visual.fullatt_block_indexes
        within: Sequence[tuple[int, int]] = () if full else windows
        recompute_block = number < recompute * len(visual.blocks)
        hidden = checkpoint_if(recompute_block, block, layer, hidden, angles, within)
    merged = visual.merger(hidden).view(len(patches), -1, visual.merger.mlp[-1].out_features)
    return [merged.index_select(1, (order[:: merge**2] // merge**2).argsort())]


@lru_cache(maxsize=256)
def _windows(size: Size, merge: int, side: int) -> tuple[Tensor, list[tuple[int, int]]]:
    """The order [L] of an image's patches by windows of side x side visual tokens, and a pair
    (windows, patches of each) for each length of window.

    The merge x merge patches of a visual token stay together.
    """
    row, column = np.divmod(np.arange(size[0] * size[1] // merge**2), size[1] // merge)
    window = row // side * (size[1] // merge) + column // side
    _, inverse, lengths = np.unique(window, return_inverse=True, return_counts=True)
    order = np.lexsort((window, lengths[inverse]))
    patches = (order[:, None] * merge**2 + np.arange(merge**2)).ravel()
    each, counts = np.unique(lengths, return_counts=True)
    windows = [
        (int(count), int(length) * merge**2) for length, count in zip(each, counts, strict=True)
    ]
    return torch.from_numpy(patches), windows
