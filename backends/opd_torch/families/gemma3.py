"""Gemma 3: layers with and without a sliding window, each kind with another rotary base; four norms
per layer; the tokens of an image attend to each other in both directions.

Source: `modeling_gemma3.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from opd.types import Prompt
from opd_torch.batch import Visibility
from opd_torch.device import Device
from opd_torch.families.decoder import Decoder
from opd_torch.kernels.rotary import rotary_factors
from opd_torch.layers.attention import NormedHeads
from opd_torch.layers.layer import Angles, Layer, checkpoint_if
from opd_torch.layers.modules import DecoderLayer, Map
from opd_torch.vision import ImageBatch, visual_features


class Gemma3(Decoder):
    """The family of Gemma 3. The embedding module scales text; image features are not scaled."""

    model_types = ("gemma3",)
    architecture = "Gemma3ForConditionalGeneration"
    image_blocks = True

    def layers(self, module: Any) -> list[Layer]:
        """Layers that attend to earlier tokens within the layer's window, if it has one, and to all
        tokens of the same image.
        """
        kinds = self._kinds(module)
        rotary = [sorted(set(kinds)).index(kind) for kind in kinds]
        layers = zip(self.text(module).layers, rotary, strict=True)
        return [
            FourNorms(
                layer, Visibility(layer.self_attn.sliding_window, blocks=self.image_blocks), number
            )
            for layer, number in layers
        ]

    def angles(self, module: Any, positions: Tensor, hidden: Tensor) -> tuple[Angles, ...]:
        """The rotary factors of each type of layer, sorted by the types' names."""
        rotary, kinds = self.text(module).rotary_emb, sorted(set(self._kinds(module)))
        pairs = (rotary(hidden[None], positions, kind) for kind in kinds)
        return tuple(
            rotary_factors(cosines[0, :, None], sines[0, :, None]) for cosines, sines in pairs
        )

    def vision(self, module: Any) -> list[nn.Module]:
        """Tower and projector."""
        return [module.model.vision_tower, module.model.multi_modal_projector]

    def patches(self, config: Any, prompt: Prompt) -> int:
        """The patches of all images; every image has the same number."""
        if not prompt.images:
            return 0
        side = config.vision_config.image_size // config.vision_config.patch_size
        return len(prompt.images["pixel_values"]) * int(side) ** 2

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float
    ) -> list[Tensor]:
        """Features of all visual tokens."""
        tower, projector = module.model.vision_tower, module.model.multi_modal_projector
        dtype, layers = projector.mm_input_projection_weight.dtype, tower.encoder.layers

        def run(pixels: Tensor) -> list[Tensor]:
            hidden: Tensor = tower.embeddings(pixels.to(dtype))
            for number, layer in enumerate(layers):
                hidden = checkpoint_if(number < recompute * len(layers), layer, hidden, None)
            return [projector(tower.post_layernorm(hidden))]

        return visual_features(prompts, images, lambda pixels, _: run(pixels), device)

    def _kinds(self, module: Any) -> list[str]:
        """The type of every layer: sliding or full attention."""
        text = self.text(module)
        return list(text.config.layer_types[: len(text.layers)])


class _Module(DecoderLayer, Protocol):
    pre_feedforward_layernorm: Map
    post_feedforward_layernorm: Map


class FourNorms(NormedHeads):
    """Attention and feed-forward with a norm before and a norm after each."""

    module: _Module

    def finish(self, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """Adds the normalised output projection and the normalised feed-forward to the rows."""
        layer = self.module
        projected = layer.self_attn.o_proj(mixed.reshape(len(hidden), -1))
        hidden = hidden + layer.post_attention_layernorm(projected)
        forward = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        return hidden + layer.post_feedforward_layernorm(forward)


def images(prompt: Prompt) -> ImageBatch:
    """The size in pixels and the values [3, H, W] of each image."""
    return [((image.shape[1], image.shape[2]), image) for image in prompt.images["pixel_values"]]
