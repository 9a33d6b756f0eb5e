"""Idefics3 and SmolVLM: Llama's trunk, and a tower that gets an image in tiles and as a whole.

Source: `modeling_idefics3.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import max_pool2d

from opd.types import Prompt
from opd_torch.device import Device
from opd_torch.families.decoder import Decoder
from opd_torch.layers.layer import checkpoint_if
from opd_torch.layers.modules import Trunk
from opd_torch.vision import ImageBatch, visual_features


class Idefics3(Decoder):
    """The family of Idefics3."""

    model_types = ("idefics3",)
    architecture = "Idefics3ForConditionalGeneration"

    def text(self, module: Any) -> Trunk:
        """The language trunk."""
        trunk: Trunk = module.model.text_model
        return trunk

    def vision(self, module: Any) -> list[nn.Module]:
        """Tower and projector."""
        return [module.model.vision_model, module.model.connector]

    def patches(self, config: Any, prompt: Prompt) -> int:
        """The patches of all tiles."""
        if not prompt.images:
            return 0
        return (
            prompt.images["pixel_attention_mask"].size // int(config.vision_config.patch_size) ** 2
        )

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float
    ) -> list[Tensor]:
        """The features of all visual tokens, tile after tile."""
        tower, connector = module.model.vision_model, module.model.connector
        dtype, layers = tower.embeddings.position_embedding.weight.dtype, tower.encoder.layers

        def run(tiles: Tensor) -> list[Tensor]:
            pixels, mask = torch.split(tiles.to(dtype), [3, 1], 1)
            real = max_pool2d(mask, tower.patch_size)[:, 0] > 0
            hidden: Tensor = tower.embeddings(pixel_values=pixels, patch_attention_mask=real)
            keys = None
            if not bool(real.all()):
                keys = real.flatten(1)[:, None, None].expand(-1, 1, hidden.shape[1], -1)
            for number, layer in enumerate(layers):
                hidden = checkpoint_if(number < recompute * len(layers), layer, hidden, keys)
            return [connector(tower.post_layernorm(hidden))]

        return visual_features(prompts, tiles, lambda pixels, _: run(pixels), device)


class SmolVLM(Idefics3):
    """The family of SmolVLM 2, which has Idefics3's modules under another name."""

    model_types = ("smolvlm",)
    architecture = "SmolVLMForConditionalGeneration"


def tiles(prompt: Prompt) -> ImageBatch:
    """The size in pixels and the values [4, H, W] of each tile: three colours, and a mask that is 0
    at padding.
    """
    mask = prompt.images["pixel_attention_mask"][:, None].astype(np.float32)
    masked = np.concatenate([prompt.images["pixel_values"], mask], 1)
    return [((tile.shape[1], tile.shape[2]), tile) for tile in masked]
