"""Idefics3 and SmolVLM: Llama's trunk, and a SigLIP tower that gets an image in tiles and as a
whole.

Source: `modeling_idefics3.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from opd.types import Prompt
from opd_mlx.batch import Visibility
from opd_mlx.device import Device
from opd_mlx.families.family import Family
from opd_mlx.families.siglip import encode, patches
from opd_mlx.layers.attention import AttentionLayer, rotary_factors
from opd_mlx.layers.layer import KeysValues, Layer
from opd_mlx.layers.modules import Trunk
from opd_mlx.vision import ImageBatch, visual_features


class Idefics3(Family):
    """The family of Idefics3 and SmolVLM."""

    model_types = ("idefics3", "smolvlm")
    names: Mapping[str, str] = {
        "language_model.lm_head.": "lm_head.",
        "language_model.": "model.text_model.",
        "vision_model.": "model.vision_model.",
        "connector.": "model.connector.",
    }
    raised = ()
    vision = ("vision_model.", "connector.")

    @override
    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        from mlx_vlm.models.idefics3 import Model, ModelConfig, TextConfig, VisionConfig

        text, vision = config["text_config"], config["vision_config"]
        rope, width = text["rope_parameters"], text["hidden_size"] // text["num_attention_heads"]
        if (text.get("head_dim") or width) != width:
            raise ValueError(
                f"text_config.head_dim = {text['head_dim']} is not "
                "hidden_size / num_attention_heads; --backend cpu computes it"
            )
        args = TextConfig.from_dict({**text, "rope_theta": rope["rope_theta"]})
        tower = VisionConfig.from_dict({**vision, "model_type": "idefics3"})
        scale = config["scale_factor"]
        module = Model(ModelConfig(args, tower, "idefics3", scale_factor=scale))
        module.vision_model.post_layernorm.eps = vision["layer_norm_eps"]
        if tied:
            module.language_model.pop("lm_head")
        return module

    @override
    def text(self, module: Any) -> Trunk:
        trunk: Trunk = module.language_model
        return trunk

    @override
    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        text = config["text_config"]
        return [
            AttentionLayer(layer, text, Visibility(), device) for layer in self.text(module).layers
        ]

    @override
    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        return self.text(module).embed_tokens(tokens)

    @override
    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        args = module.config.text_config
        width = args.hidden_size // args.num_attention_heads
        return (rotary_factors(positions[0], args.rope_theta, width, dtype),)

    @override
    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float = 0
    ) -> list[mx.array]:
        tower = module.vision_model
        side = tower.embeddings.patch_size

        def tiles(prompt: Prompt) -> ImageBatch:
            """The size and the values [3, H, W] of each tile.

            The size consists of the size in patches and of the mask of patches, False at padding.
            """
            masks = prompt.images["pixel_attention_mask"].astype(bool)
            count, height, width = masks.shape
            blocks = masks.reshape(count, height // side, side, width // side, side)
            reals = np.asarray(blocks.any((2, 4)))
            return [
                ((real.shape, real.tobytes()), tile)
                for real, tile in zip(reals, prompt.images["pixel_values"], strict=True)
            ]

        def run(pixels: NDArray[np.generic], size: tuple[tuple[int, int], bytes]) -> list[mx.array]:
            real = np.frombuffer(size[1], bool).reshape(size[0])
            positions = _positions(real, tower.embeddings.num_patches_per_side)
            keys = None if real.all() else np.flatnonzero(real).astype(np.int32)
            return [module.connector(encode(tower, pixels, positions, device, recompute, keys))]

        return visual_features(prompts, tiles, run, device.pixel_bytes)

    @override
    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return dict(config)

    @override
    def patches(self, config: Mapping[str, Any], prompt: Prompt) -> list[tuple[int, int]]:
        return patches(config, prompt)


def _positions(real: NDArray[np.bool_], side: int) -> NDArray[np.int32]:
    """The rows [L] in the table of `side` x `side` positions for a tile's patches.

    A smaller tile is spread over the whole table. `real` is False at padding.
    """
    bounds = np.arange(1 / side, 1.0, 1 / side).astype(np.float32)
    sizes = zip(real.shape, (real[:, 0].sum(), real[0].sum()), strict=True)
    row, column = (
        np.searchsorted(
            bounds,
            np.minimum(
                np.arange(count, dtype=np.float32) * np.float32(1 / many), np.float32(1 - 1e-6)
            ),
            "right",
        )
        for count, many in sizes
    )
    return np.where(real, row[:, None] * side + column, 0).reshape(-1).astype(np.int32)
