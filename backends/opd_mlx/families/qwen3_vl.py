"""Qwen3-VL: norms on keys and queries, and a tower whose middle layers feed the first layers of the
language trunk (deepstack).

The tower has learned and rotary positions. Source: `modeling_qwen3_vl.py` of transformers 5.

Legend: m frames of one size, L patches of a frame, F values of a patch, D width of the trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Protocol, TypeVar

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from opd.types import Prompt
from opd_mlx.batch import Visibility
from opd_mlx.device import Device
from opd_mlx.families.family import Family
from opd_mlx.kernels.activations import exact_gelu, gelu
from opd_mlx.layers.attention import NormedHeads, attend, rotate
from opd_mlx.layers.layer import KeysValues, Layer, checkpoint_if
from opd_mlx.layers.modules import Map, Trunk
from opd_mlx.vision import ImageBatch, visual_features

_Number = TypeVar("_Number", bound=np.generic)


class VisionAttention(Protocol):
    """The parts of a vision tower's attention, by mlx-vlm's names."""

    num_heads: int
    head_dim: int
    scale: float
    qkv: Map
    proj: Map


class VisionBlock(Protocol):
    """The parts of a vision tower's block, by mlx-vlm's names; `mlp` differs between families."""

    attn: VisionAttention
    norm1: Map
    norm2: Map


class _Projection(Protocol):
    weight: mx.array
    bias: mx.array


class _Patches(Protocol):
    proj: _Projection


class VisionTower(Protocol):
    """The parts of Qwen's vision tower, by mlx-vlm's names."""

    spatial_merge_size: int
    patch_embed: _Patches
    merger: Map


class _FeedForward(Protocol):
    linear_fc1: Map
    linear_fc2: Map


class _Block(VisionBlock, Protocol):
    mlp: _FeedForward


class _Tower(VisionTower, Protocol):
    num_grid_per_side: int
    pos_embed: Map
    blocks: Sequence[_Block]
    deepstack_visual_indexes: list[int]
    deepstack_merger_list: Sequence[Map]


class QwenVL(Family):
    """The code that all Qwen-VL families share."""

    names: Mapping[str, str] = {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.visual.",
        "language_model.lm_head.": "lm_head.",
    }
    raised: tuple[str, ...] = ()
    vision = ("vision_tower.",)

    @override
    def text(self, module: Any) -> Trunk:
        trunk: Trunk = module.language_model.model
        return trunk

    @override
    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        return self.text(module).embed_tokens(tokens)

    @override
    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        # mlx-vlm's rotary module assigns the axes of positions to frequencies.
        layers = module.language_model.model.layers
        attention = next(layer.self_attn for layer in layers if "self_attn" in layer)
        cosines, sines = attention.rotary_emb(mx.zeros((), dtype), positions[:, None])
        return ((cosines[0, :, None], sines[0, :, None]),)

    @override
    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float = 0
    ) -> list[mx.array]:
        def run(patches: NDArray[np.generic], size: tuple[int, int]) -> list[mx.array]:
            return self.tower(module.vision_tower, mx.array(patches), size, device, recompute)

        return visual_features(prompts, frames, run, device.pixel_bytes)

    def tower(
        self,
        visual: Any,
        patches: mx.array,
        size: tuple[int, int],
        device: Device,
        recompute: float,
    ) -> list[mx.array]:
        """Features [m, L / merge^2, D] of `patches` [m, L, F]: of the merger, then of each
        deepstack layer.
        """
        raise NotImplementedError

    @override
    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    @override
    def patches(self, config: Mapping[str, Any], prompt: Prompt) -> list[tuple[int, int]]:
        grid = prompt.images.get("image_grid_thw", np.zeros((0, 3), int))
        return [(1, patches) for patches in grid.prod(-1).tolist()]


class Qwen3VL(QwenVL):
    """The family of Qwen3-VL."""

    model_types: tuple[str, ...] = ("qwen3_vl",)

    @override
    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        from mlx_vlm.models.qwen3_vl import Model, ModelConfig

        rope = config["text_config"]["rope_parameters"]
        text = {
            **config["text_config"],
            "rope_theta": rope["rope_theta"],
            "rope_scaling": rope,
            "tie_word_embeddings": tied,
        }
        vision = {**config["vision_config"], "model_type": "qwen3_vl"}
        module = Model(
            ModelConfig.from_dict({**config, "text_config": text, "vision_config": vision})
        )
        tower = module.vision_tower
        for merger in (tower.merger, *tower.deepstack_merger_list):
            merger.act_fn = exact_gelu
        return module

    @override
    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        text = config["text_config"]
        return [
            NormedHeads(layer, text, Visibility(), device) for layer in self.text(module).layers
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
        projection, merge = visual.patch_embed.proj, visual.spatial_merge_size
        kernel = projection.weight.transpose(4, 1, 2, 3, 0).reshape(-1, projection.weight.shape[0])
        hidden = mx.addmm(projection.bias, patches.flatten(0, 1).astype(kernel.dtype), kernel)
        index, weights = _interpolation(*size, visual.num_grid_per_side, merge)
        weighted = visual.pos_embed(mx.array(index)) * mx.array(weights, kernel.dtype)[..., None]
        positions = weighted.sum(0)
        hidden = hidden.reshape(-1, *positions.shape) + positions
        angles = vision_angles(*size, visual.blocks[0].attn.head_dim, merge)
        factors = mx.array(np.cos(angles)), mx.array(np.sin(angles))
        levels: list[mx.array] = []
        blocks = visual.blocks
        for number, block in enumerate(blocks):

            def run(hidden: mx.array, block: _Block = block) -> mx.array:
                normalised = block.norm1(hidden)
                hidden = hidden + image_attention(block.attn, normalised, factors, device)
                fed = block.mlp.linear_fc2(gelu(block.mlp.linear_fc1(block.norm2(hidden))))
                return hidden + fed

            hidden = checkpoint_if(number < recompute * len(blocks), block, run)(hidden)
            if number in visual.deepstack_visual_indexes:
                place = visual.deepstack_visual_indexes.index(number)
                levels.append(visual.deepstack_merger_list[place](hidden.flatten(0, 1)))
        levels.insert(0, visual.merger(hidden.flatten(0, 1)))
        return [level.reshape(len(patches), -1, level.shape[-1]) for level in levels]


def frames(prompt: Prompt) -> ImageBatch:
    """The size in patches and the patches [L, F] of every frame of a prompt's images, since
    attention stays within a frame.
    """
    grid = prompt.images["image_grid_thw"]
    sizes = [(int(h), int(w)) for t, h, w in grid for _ in range(t)]
    cuts = np.cumsum([h * w for h, w in sizes])[:-1]
    return list(zip(sizes, np.split(prompt.images["pixel_values"], cuts), strict=True))


def image_attention(
    attention: VisionAttention, hidden: mx.array, factors: tuple[mx.array, mx.array], device: Device
) -> mx.array:
    """Attention of hidden [..., L, width] within each image.

    `factors` are cosines and sines that broadcast to [..., heads, L, head width].
    """
    *lead, patches, width = hidden.shape
    qkv = attention.qkv(hidden)
    qkv = qkv.reshape(*lead, patches, 3, attention.num_heads, attention.head_dim)
    query, key, value = (part.squeeze(-3).swapaxes(-3, -2) for part in mx.split(qkv, 3, axis=-3))
    query, key = (rotate(heads, *factors).astype(heads.dtype) for heads in (query, key))
    query, key, value = (heads.reshape(-1, *heads.shape[-3:]) for heads in (query, key, value))
    mixed = attend(query, key, value, attention.scale, device).swapaxes(-3, -2)
    return attention.proj(mixed.reshape(*lead, patches, width))


@lru_cache(maxsize=256)
def _interpolation(
    height: int, width: int, side: int, merge: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Bilinear interpolation of the learned side x side positions at an image's patches: indices
    and weights of the four corners, [4, L] each.
    """
    rows, columns = (np.linspace(0, side - 1, count, dtype=np.float32) for count in (height, width))
    row, column = rows.astype(np.int32), columns.astype(np.int32)
    below, right = np.minimum(row + 1, side - 1), np.minimum(column + 1, side - 1)
    down, across = (rows - row)[:, None], (columns - column)[None]
    corners = [(y, x) for y in (row, below) for x in (column, right)]
    index = np.stack([y[:, None] * side + x[None] for y, x in corners])
    weights = np.stack(
        [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across]
    )
    return merged(index, merge), merged(weights, merge)


@lru_cache(maxsize=256)
def vision_angles(height: int, width: int, head: int, merge: int) -> NDArray[np.float32]:
    """The rotary angles [L, head width]: a quarter for rows, a quarter for columns, and both
    quarters repeated.
    """
    exponents = np.arange(0, head // 2, 2, dtype=np.float32) / (head // 2)
    frequencies = 1.0 / 10000.0**exponents
    row, column = merged(np.indices((height, width)), merge)
    angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=-1)
    return np.concatenate([angles, angles], axis=-1).astype(np.float32)


def merged(grid: NDArray[_Number], merge: int) -> NDArray[_Number]:
    """Reorders [..., rows, columns] to [..., L] in the order of patches, in which the merge x merge
    patches of a visual token are consecutive.
    """
    *lead, height, width = grid.shape
    blocks = grid.reshape(*lead, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(np.swapaxes(blocks, -3, -2).reshape(*lead, height * width))
