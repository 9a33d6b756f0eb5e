"""Qwen2.5-VL: projections with biases, and a tower whose blocks, except a few, attend within
windows.

Source: `modeling_qwen2_5_vl.py` of transformers 5.

Legend: m frames of one size, L patches of a frame, F values of a patch, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from opd_mlx.batch import Visibility
from opd_mlx.device import Device
from opd_mlx.families.qwen3_vl import (
    QwenVL,
    VisionAttention,
    VisionBlock,
    VisionTower,
    image_attention,
    merged,
    vision_angles,
)
from opd_mlx.kernels.activations import exact_gelu
from opd_mlx.layers.attention import AttentionLayer, feed_forward
from opd_mlx.layers.layer import Layer, checkpoint_if
from opd_mlx.layers.modules import FeedForward


class _Block(VisionBlock, Protocol):
    mlp: FeedForward


class _Tower(VisionTower, Protocol):
    patch_size: int
    window_size: int
    blocks: Sequence[_Block]
    fullatt_block_indexes: Sequence[int]


class Qwen25VL(QwenVL):
    """The family of Qwen2.5-VL."""

    model_types = ("qwen2_5_vl",)

    @override
    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig, VisionConfig

        given = config["text_config"]["rope_parameters"]
        text = {
            **config["text_config"],
            "rope_theta": given["rope_theta"],
            "rope_scaling": {"type": "default", "mrope_section": given["mrope_section"]},
            "tie_word_embeddings": tied,
        }
        vision = {**config["vision_config"], "model_type": "qwen2_5_vl"}
        args, tower = TextConfig.from_dict(text), VisionConfig.from_dict(vision)
        module = Model(ModelConfig(args, tower, "qwen2_5_vl"))
        module.vision_tower.merger.mlp[1] = exact_gelu
        return module

    @override
    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        # Published files have the language model's sizes at the top level.
        text = {k: value for k, value in config.get("text_config", {}).items() if k != "model_type"}
        rope = text.get("rope_parameters", {})
        if "rope_theta" in rope:
            text["rope_theta"] = rope["rope_theta"]
        if "mrope_section" in rope:
            text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        vision = {**config["vision_config"], "model_type": "qwen2_5_vl"}
        return {**text, **config, "vision_config": vision}

    @override
    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        text = config["text_config"]
        windows = {"sliding_attention": text["sliding_window"]}
        return [
            AttentionLayer(layer, text, Visibility(windows.get(kind)), device)
            for layer, kind in zip(self.text(module).layers, text["layer_types"], strict=True)
        ]

    @override
    def tower(
        self,
        visual: _Tower,
        patches: mx.array,
        size: tuple[int, int],
        device: Device,
        recompute: float,
    ) -> list[mx.array]:
        # Patches are reordered window by window, with windows of equal length together, so that
        # each length is one batch. The blocks' results do not depend on the order.
        frames, count = patches.shape[:2]
        projection, merge = visual.patch_embed.proj, visual.spatial_merge_size
        kernel = projection.weight.transpose(4, 1, 2, 3, 0).reshape(-1, projection.weight.shape[0])
        order, windows = _windows(*size, merge, visual.window_size // visual.patch_size)
        hidden = patches.astype(kernel.dtype)[:, mx.array(order)] @ kernel
        angles = vision_angles(*size, visual.blocks[0].attn.head_dim, merge)[order]
        factors = mx.array(np.cos(angles)), mx.array(np.sin(angles))
        blocks = visual.blocks
        for number, block in enumerate(blocks):
            cuts = [(count, 1)] if number in visual.fullatt_block_indexes else windows

            def run(
                hidden: mx.array, block: _Block = block, cuts: list[tuple[int, int]] = cuts
            ) -> mx.array:
                normalised = block.norm1(hidden)
                hidden = hidden + _within(block.attn, normalised, factors, cuts, device)
                return hidden + feed_forward(block.mlp, block.norm2(hidden))

            hidden = checkpoint_if(number < recompute * len(blocks), block, run)(hidden)
        features = visual.merger(hidden.flatten(0, 1)).reshape(frames, count // merge**2, -1)
        return [features[:, mx.array(np.argsort(order[:: merge**2]).astype(np.int32))]]


def _within(
    attention: VisionAttention,
    hidden: mx.array,
    factors: tuple[mx.array, mx.array],
    cuts: list[tuple[int, int]],
    device: Device,
) -> mx.array:
    """Attention of hidden [m, L, width] within windows; `cuts` are pairs (length, windows) in the
    order of rows.
    """
    parts, start = [], 0
    for length, many in cuts:
        rows = slice(start, start + length * many)
        start = rows.stop
        windows = hidden[:, rows].reshape(-1, many, length, hidden.shape[-1])
        cosines, sines = (part[rows].reshape(many, 1, length, -1) for part in factors)
        mixed = image_attention(attention, windows, (cosines, sines), device)
        parts.append(mixed.flatten(1, 2))
    return mx.concatenate(parts, axis=1)


@lru_cache(maxsize=256)
def _windows(
    height: int, width: int, merge: int, window: int
) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
    """The order [L] of an image's patches by windows of `window` x `window` patches, shortest
    first, and a pair (length, windows) for each length of window.

    The merge x merge patches of a visual token stay together.
    """
    row, column = merged(np.indices((height, width)), merge)
    side = window // merge * merge
    number = row // side * -(-width // side) + column // side
    _, index, lengths = np.unique(number, return_inverse=True, return_counts=True)
    order = np.lexsort((np.arange(len(number)), number, lengths[index]))
    different, many = np.unique(lengths, return_counts=True)
    return order.astype(np.int32), list(zip(different.tolist(), many.tolist(), strict=True))
