"""Idefics3 and SmolVLM: a Llama, and a tower that sees an image in tiles and once more as a whole.

Source: `modeling_idefics3.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import max_pool2d

from opd.types import Prompt
from opd_torch.families.decoder import Decoder
from opd_torch.vision import Frames, computed, visual_features


class Idefics3(Decoder):
    """See `opd_torch.families.Family`."""

    model_types = ("idefics3",)
    architecture = "Idefics3ForConditionalGeneration"

    def language(self, model: Any) -> Any:
        """The language trunk."""
        return model.model.text_model

    def vision(self, model: Any) -> list[Any]:
        """Tower and projector."""
        return [model.model.vision_model, model.model.connector]

    def patches(self, prompt: Prompt, model: Any) -> int:
        """Of all tiles."""
        return prompt.images["pixel_attention_mask"].size // model.config.vision_config.patch_size**2 if prompt.images else 0

    def features(self, model: Any, prompts: Sequence[Prompt], again: float) -> list[Tensor]:
        """Features of all visual tokens, tile after tile."""
        tower, connector = model.model.vision_model, model.model.connector
        weight = tower.embeddings.position_embedding.weight

        def run(tiles: Tensor) -> list[Tensor]:
            pixels, mask = tiles.to(weight.dtype).split([3, 1], 1)
            real = max_pool2d(mask, tower.patch_size)[:, 0] > 0
            hidden = tower.embeddings(pixel_values=pixels, patch_attention_mask=real)
            keys = None if bool(real.all()) else real.flatten(1)[:, None, None].expand(-1, 1, hidden.shape[1], -1)
            for number, layer in enumerate(tower.encoder.layers):
                hidden = computed(number < again * len(tower.encoder.layers), layer, hidden, keys)
            return [connector(tower.post_layernorm(hidden))]

        return visual_features(prompts, tiles, lambda found, _: run(found), weight.device)


class SmolVLM(Idefics3):
    """SmolVLM 2, whose modules are Idefics3's under another name."""

    model_types = ("smolvlm",)
    architecture = "SmolVLMForConditionalGeneration"


def tiles(prompt: Prompt) -> Frames:
    """Size in pixels of each tile, and its values [4, H, W]: colours, and where they are no padding."""
    masked = np.concatenate([prompt.images["pixel_values"], prompt.images["pixel_attention_mask"][:, None].astype(np.float32)], 1)
    return [((tile.shape[1], tile.shape[2]), tile) for tile in masked]
