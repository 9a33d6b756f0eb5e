"""Gemma 3: sliding and full layers with rotary bases of their own, images that see themselves in both directions, four norms a layer.

Source: `modeling_gemma3.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from opd.types import Prompt
from opd_torch.batch import Reach
from opd_torch.families.decoder import NormedDecoder
from opd_torch.kernels.rotary import turns
from opd_torch.layers.attention import Angles
from opd_torch.vision import Frames, computed, visual_features


class Gemma3(NormedDecoder):
    """See `opd_torch.families.Family`. The embedding module itself scales text; image features are not scaled."""

    model_types = ("gemma3",)
    architecture = "Gemma3ForConditionalGeneration"

    def vision(self, model: Any) -> list[Any]:
        """Tower and projector."""
        return [model.model.vision_tower, model.model.multi_modal_projector]

    def patches(self, prompt: Prompt, model: Any) -> int:
        """Every image has as many."""
        vision = model.config.vision_config
        return len(prompt.images["pixel_values"]) * (vision.image_size // vision.patch_size) ** 2 if prompt.images else 0

    def features(self, model: Any, prompts: Sequence[Prompt], again: float) -> list[Tensor]:
        """Features of all visual tokens."""
        tower, projector = model.model.vision_tower, model.model.multi_modal_projector
        weight = projector.mm_input_projection_weight

        def run(pixels: Tensor) -> list[Tensor]:
            hidden = tower.embeddings(pixels.to(weight.dtype))
            for number, layer in enumerate(tower.encoder.layers):
                hidden = computed(number < again * len(tower.encoder.layers), layer, hidden, None)
            return [projector(tower.post_layernorm(hidden))]

        return visual_features(prompts, images, lambda pixels, _: run(pixels), weight.device)

    def angles(self, text: Any, positions: Tensor, hidden: Tensor) -> list[Angles]:
        """A rotation for each type of layer."""
        kinds = text.config.layer_types[: len(text.layers)]
        found = {kind: turns(*(x[0, :, None] for x in text.rotary_emb(hidden[None], positions, kind))) for kind in set(kinds)}
        return [found[kind] for kind in kinds]

    def reach(self, layer: Any) -> Reach:
        """Within the window, where there is one: tokens before, and the whole of a token's own image."""
        return Reach(layer.self_attn.sliding_window, blocks=True)

    def finish(self, layer: Any, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """As everywhere, with a norm behind attention and behind feed-forward too."""
        hidden = hidden + layer.post_attention_layernorm(layer.self_attn.o_proj(mixed.reshape(len(hidden), -1)))
        out: Tensor = hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
        return out


def images(prompt: Prompt) -> Frames:
    """Size in pixels, and values [3, H, W], of each image."""
    return [((image.shape[1], image.shape[2]), image) for image in prompt.images["pixel_values"]]
