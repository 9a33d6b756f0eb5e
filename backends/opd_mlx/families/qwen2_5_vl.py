"""Qwen2.5-VL: projections with biases, mRoPE in chunks, a tower that attends within windows in most blocks.

Source: `modeling_qwen2_5_vl.py` of transformers 5.

Legend: m frames of one size, L patches of a frame, F values of a patch, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import checkpoint
from numpy.typing import NDArray

from opd_mlx.batch import Rule
from opd_mlx.families.qwen3_vl import QwenVL, head_counts, image_attention, merged, vision_angles
from opd_mlx.kernels.exponentials import exact_gelu
from opd_mlx.layers.attention import AttentionLayer, feed_forward
from opd_mlx.layers.layer import Layer


class Qwen25VL(QwenVL):
    """See `Family`."""

    model_types = ("qwen2_5_vl",)

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """See `Family`."""
        from mlx_vlm.models.qwen2_5_vl import Model, ModelConfig, TextConfig, VisionConfig

        rope = {"type": "default", "mrope_section": config["text_config"]["rope_parameters"]["mrope_section"]}
        theta = config["text_config"]["rope_parameters"]["rope_theta"]
        text = {**config["text_config"], "rope_theta": theta, "rope_scaling": rope, "tie_word_embeddings": tied}
        vision = {**config["vision_config"], "model_type": "qwen2_5_vl"}
        module = Model(ModelConfig(TextConfig.from_dict(text), VisionConfig.from_dict(vision), "qwen2_5_vl"))
        module.vision_tower.merger.mlp[1] = exact_gelu
        return module

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`: the text's sizes stand beside all else."""
        text = {name: value for name, value in config.get("text_config", {}).items() if name != "model_type"}
        rope = text.get("rope_parameters", {})
        if "rope_theta" in rope:
            text["rope_theta"] = rope["rope_theta"]
        if "mrope_section" in rope:
            text["rope_scaling"] = {"type": "mrope", "mrope_section": rope["mrope_section"]}
        return {**text, **config, "vision_config": {**config["vision_config"], "model_type": "qwen2_5_vl"}}

    def layers(self, module: Any, config: Mapping[str, Any]) -> list[Layer]:
        """See `Family`."""
        text = config["text_config"]
        windows = [text["sliding_window"] if kind == "sliding_attention" else None for kind in text["layer_types"]]
        return [
            AttentionLayer(layer, *head_counts(config), layer.self_attn.scale, Rule(window))
            for layer, window in zip(self.text(module).layers, windows, strict=True)
        ]

    def tower(self, visual: Any, patches: mx.array, size: tuple[int, int], again: float) -> list[mx.array]:
        """Merged features [m, L / merge^2, D] of `patches` [m, L, F].

        Patches stand window by window, windows of equal length together, so that each length is one batch. No block sees the order.
        """
        frames, count = patches.shape[:2]
        projection, merge = visual.patch_embed.proj, visual.spatial_merge_size
        kernel = projection.weight.transpose(4, 1, 2, 3, 0).reshape(-1, projection.weight.shape[0])
        order, lengths = _windows(*size, merge, visual.window_size // visual.patch_size)
        hidden = patches.astype(kernel.dtype)[:, mx.array(order)] @ kernel
        angles = vision_angles(*size, visual.blocks[0].attn.head_dim, merge)[order]
        cosines, sines = mx.array(np.cos(angles)), mx.array(np.sin(angles))
        for number, block in enumerate(visual.blocks):
            cuts = [(count, 1)] if number in visual.fullatt_block_indexes else lengths

            def run(hidden: mx.array, block: Any = block, cuts: list[tuple[int, int]] = cuts) -> mx.array:
                hidden = hidden + _within(block.attn, block.norm1(hidden), (cosines, sines), cuts)
                out: mx.array = hidden + feed_forward(block.mlp, block.norm2(hidden))
                return out

            hidden = (checkpoint(block, run) if number < again * len(visual.blocks) else run)(hidden)
        merger = visual.merger(hidden.flatten(0, 1)).reshape(frames, count // merge**2, -1)
        return [merger[:, mx.array(np.argsort(order[:: merge**2]).astype(np.int32))]]


def _within(attention: Any, hidden: mx.array, rotary: tuple[mx.array, mx.array], cuts: list[tuple[int, int]]) -> mx.array:
    """Attention of hidden [m, L, width] within windows, of which `cuts` gives (length, how many) in their order."""
    parts, start = [], 0
    for length, many in cuts:
        rows = slice(start, start + length * many)
        start = rows.stop
        windows = hidden[:, rows].reshape(-1, many, length, hidden.shape[-1])
        angles = (part[rows].reshape(many, 1, length, -1) for part in rotary)
        parts.append(image_attention(attention, windows, (next(angles), next(angles))).flatten(1, 2))
    return mx.concatenate(parts, axis=1)


@lru_cache(maxsize=256)
def _windows(height: int, width: int, merge: int, window: int) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
    """Order [L] of an image's patches by windows of `window` patches a side, shortest first, and (length, how many) of each length.

    The merge x merge patches of a visual token stay together, as they are given.
    """
    row, column = merged(np.indices((height, width)), merge)
    side = window // merge * merge
    number = row // side * -(-width // side) + column // side
    _, index, lengths = np.unique(number, return_inverse=True, return_counts=True)
    order = np.lexsort((np.arange(len(number)), number, lengths[index]))
    found, many = np.unique(lengths, return_counts=True)
    return order.astype(np.int32), list(zip(found.tolist(), many.tolist(), strict=True))
