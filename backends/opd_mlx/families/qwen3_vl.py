"""Qwen3-VL: q/k norms, interleaved mRoPE, a tower with learned and rotary positions, features also after the first layers.

Source: `modeling_qwen3_vl.py` of transformers 5.

Legend: m frames of one size, L patches of a frame, F values of a patch, D text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.nn.utils import checkpoint
from numpy.typing import NDArray

from opd.types import Prompt
from opd_mlx.batch import Rule
from opd_mlx.kernels.exponentials import exact_gelu, gelu
from opd_mlx.kernels.scores import KEPT_BYTES
from opd_mlx.layers.attention import AttentionLayer, attend, rotate
from opd_mlx.layers.layer import KeysValues, Layer
from opd_mlx.vision import Piece, visual_features


class QwenVL:
    """What the Qwen-VL families share."""

    names: Mapping[str, str] = {
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.visual.",
        "language_model.lm_head.": "lm_head.",
    }
    raised: tuple[str, ...] = ()
    vision = ("vision_tower.",)

    def text(self, module: Any) -> Any:
        """See `Family`."""
        return module.language_model.model

    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        """See `Family`."""
        return cast("mx.array", module.language_model.model.embed_tokens(tokens))

    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        """One kind, as mlx-vlm's rotary module deals the axes out over the frequencies."""
        attention = next(layer.self_attn for layer in module.language_model.model.layers if "self_attn" in layer)
        cosines, sines = attention.rotary_emb(mx.zeros((), dtype), positions[:, None])
        return ((cosines[0, :, None], sines[0, :, None]),)

    def features(self, module: Any, prompts: Sequence[Prompt], again: float = 0) -> list[mx.array]:
        """See `Family`."""
        visual = module.vision_tower
        return visual_features(prompts, frames, lambda pieces, size: self.tower(visual, mx.array(pieces), size, again))

    def tower(self, visual: Any, patches: mx.array, size: tuple[int, int], again: float) -> list[mx.array]:
        """Merged features [m, L / merge^2, D] of `patches` [m, L, F], and of further levels."""
        raise NotImplementedError

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        return dict(config)

    def vision_bytes(self, config: Mapping[str, Any], prompt: Prompt, itemsize: int) -> int:
        """What each block's products keep, and scores where they are few."""
        vision = config["vision_config"]
        sizes = [t * h * w for t, h, w in prompt.images.get("image_grid_thw", np.zeros((0, 3))).tolist()]
        a_patch = 10 * vision["hidden_size"] + 3 * vision["intermediate_size"]
        return int(vision["depth"] * sum(itemsize * size * a_patch + min(4 * vision["num_heads"] * size**2, KEPT_BYTES) for size in sizes))


class Qwen3VL(QwenVL):
    """See `Family`."""

    model_types = ("qwen3_vl",)

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """See `Family`."""
        from mlx_vlm.models.qwen3_vl import Model, ModelConfig

        text, vision = dict(config["text_config"]), {**config["vision_config"], "model_type": "qwen3_vl"}
        text["rope_theta"], text["rope_scaling"] = text["rope_parameters"]["rope_theta"], text["rope_parameters"]
        text["tie_word_embeddings"] = tied
        module = Model(ModelConfig.from_dict({**config, "text_config": text, "vision_config": vision}))
        for merger in (module.vision_tower.merger, *module.vision_tower.deepstack_merger_list):
            merger.act_fn = exact_gelu
        return module

    def layers(self, module: Any, config: Mapping[str, Any]) -> list[Layer]:
        """See `Family`."""
        return [NormedHeads(layer, *head_counts(config), layer.self_attn.scale, Rule()) for layer in self.text(module).layers]

    def tower(self, visual: Any, patches: mx.array, size: tuple[int, int], again: float) -> list[mx.array]:
        """Of `patches` [m, L, F]: merged features [m, L / merge^2, D], and those of each deepstack layer."""
        projection = visual.patch_embed.proj
        kernel = projection.weight.transpose(4, 1, 2, 3, 0).reshape(-1, projection.weight.shape[0])
        hidden = mx.addmm(projection.bias, patches.flatten(0, 1).astype(kernel.dtype), kernel)
        index, weights = _interpolation(*size, visual.num_grid_per_side, visual.spatial_merge_size)
        positions = (visual.pos_embed(mx.array(index)) * mx.array(weights, dtype=kernel.dtype)[..., None]).sum(0)
        hidden = hidden.reshape(-1, *positions.shape) + positions
        angles = vision_angles(*size, visual.blocks[0].attn.head_dim, visual.spatial_merge_size)
        rotary = mx.array(np.cos(angles)), mx.array(np.sin(angles))
        levels = []
        for number, block in enumerate(visual.blocks):

            def run(hidden: mx.array, block: Any = block) -> mx.array:
                hidden = hidden + image_attention(block.attn, block.norm1(hidden), rotary)
                out: mx.array = hidden + block.mlp.linear_fc2(gelu(block.mlp.linear_fc1(block.norm2(hidden))))
                return out

            hidden = (checkpoint(block, run) if number < again * len(visual.blocks) else run)(hidden)
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                levels.append(merger(hidden.flatten(0, 1)))
        return [level.reshape(len(patches), -1, level.shape[-1]) for level in (visual.merger(hidden.flatten(0, 1)), *levels)]


class NormedHeads(AttentionLayer):
    """Queries and keys are normalised head by head."""

    def query(self, rows: mx.array) -> tuple[mx.array, mx.array | None]:
        """See `AttentionLayer`."""
        query, beside = super().query(rows)
        return self.module.self_attn.q_norm(query), beside

    def key(self, rows: mx.array) -> mx.array:
        """See `AttentionLayer`."""
        return cast("mx.array", self.module.self_attn.k_norm(super().key(rows)))


def head_counts(config: Mapping[str, Any]) -> tuple[int, int]:
    """Heads of queries, and of keys and values."""
    return config["text_config"]["num_attention_heads"], config["text_config"]["num_key_value_heads"]


def frames(prompt: Prompt) -> list[Piece]:
    """Size in patches, and patches [L, F], of every frame of a prompt's images; attention never leaves a frame."""
    sizes = [(int(h), int(w)) for t, h, w in prompt.images["image_grid_thw"] for _ in range(t)]
    cuts = np.cumsum([h * w for h, w in sizes])[:-1]
    return list(zip(sizes, np.split(prompt.images["pixel_values"], cuts), strict=True))


def image_attention(attention: Any, hidden: mx.array, rotary: tuple[mx.array, mx.array]) -> mx.array:
    """Full attention within each piece; hidden [..., L, width], rotary cosines and sines, that broadcast to [..., heads, L, head width]."""
    *lead, patches, width = hidden.shape
    qkv = attention.qkv(hidden).reshape(*lead, patches, 3, attention.num_heads, attention.head_dim)
    query, key, value = (part.squeeze(-3).swapaxes(-3, -2) for part in mx.split(qkv, 3, axis=-3))
    query, key = (rotate(heads, *rotary).astype(heads.dtype) for heads in (query, key))
    query, key, value = (heads.reshape(-1, *heads.shape[-3:]) for heads in (query, key, value))
    mixed = attend(query, key, value, attention.scale).swapaxes(-3, -2)
    out: mx.array = attention.proj(mixed.reshape(*lead, patches, width))
    return out


@lru_cache(maxsize=256)
def _interpolation(height: int, width: int, side: int, merge: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Bilinear resampling of the learned side x side positions to an image's patches: ids and weights, both [4, L], in patch order."""
    rows, columns = (np.linspace(0, side - 1, count, dtype=np.float32) for count in (height, width))
    row, column = rows.astype(np.int32), columns.astype(np.int32)
    below, right = np.minimum(row + 1, side - 1), np.minimum(column + 1, side - 1)
    down, across = (rows - row)[:, None], (columns - column)[None]
    index = np.stack([y[:, None] * side + x[None] for y in (row, below) for x in (column, right)])
    weights = np.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across])
    return merged(index, merge), merged(weights, merge)


@lru_cache(maxsize=256)
def vision_angles(height: int, width: int, head: int, merge: int) -> NDArray[np.float32]:
    """Rotary angles [L, head width]: a quarter of the frequencies for the row, a quarter for the column, and both again."""
    frequencies = 1.0 / 10000.0 ** (np.arange(0, head // 2, 2, dtype=np.float32) / (head // 2))
    row, column = merged(np.indices((height, width)), merge)
    angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=-1)
    return np.concatenate([angles, angles], axis=-1).astype(np.float32)


def merged(grid: NDArray[Any], merge: int) -> NDArray[Any]:
    """[..., rows, columns] as [..., L] in the order of patches: the merge x merge patches of a visual token stand together."""
    *lead, height, width = grid.shape
    blocks = grid.reshape(*lead, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(np.swapaxes(blocks, -3, -2).reshape(*lead, height * width))
