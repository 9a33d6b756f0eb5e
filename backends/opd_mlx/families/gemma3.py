"""Gemma 3: layers with and without a sliding window, each kind with another rotary base; four norms
per layer; the tokens of an image attend to each other in both directions.

Source: `modeling_gemma3.py` of transformers 5. mlx-vlm's forward differs: it has one mask for all
layers, and rounds the embeddings' scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx
import numpy as np
from typing_extensions import override

from opd.types import Prompt
from opd_mlx.batch import Visibility
from opd_mlx.device import Device
from opd_mlx.families.family import Family
from opd_mlx.families.siglip import encode, patches
from opd_mlx.layers.attention import NormedHeads, rotary_factors
from opd_mlx.layers.layer import KeysValues, Layer
from opd_mlx.layers.modules import DecoderLayer, Map, Trunk
from opd_mlx.vision import ImageBatch, visual_features

KINDS = ("sliding_attention", "full_attention")
"""The types of layers, in the order of `Layer.rotary`."""


class Gemma3(Family):
    """The family of Gemma 3."""

    model_types = ("gemma3",)
    image_blocks = True
    names: Mapping[str, str] = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    raised = ()
    vision = ("vision_tower.", "multi_modal_projector.")

    @override
    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        from mlx_vlm.models.gemma3 import Model, ModelConfig, TextConfig, VisionConfig

        text, vision = config["text_config"], config["vision_config"]
        image_tokens = config["mm_tokens_per_image"]
        args = TextConfig.from_dict({**text, "mm_tokens_per_image": image_tokens})
        tower = VisionConfig.from_dict(vision)
        module = Model(ModelConfig(args, tower, "gemma3", vocab_size=text["vocab_size"]))
        module.vision_tower.vision_model.post_layernorm.eps = vision["layer_norm_eps"]
        if tied:
            module.language_model.pop("lm_head")
        ropes = [text["rope_parameters"][kind] for kind in KINDS]
        # MLX does not treat attributes that begin with an underscore as parameters.
        module._bases = [
            (rope["rope_theta"], rope.get("factor", 1.0), text["head_dim"]) for rope in ropes
        ]
        return module

    @override
    def text(self, module: Any) -> Trunk:
        trunk: Trunk = module.language_model.model
        return trunk

    @override
    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        text = config["text_config"]
        visibility = {
            "sliding_attention": Visibility(text["sliding_window"], self.image_blocks),
            "full_attention": Visibility(blocks=self.image_blocks),
        }
        return [
            FourNorms(layer, text, visibility[kind], device, KINDS.index(kind))
            for layer, kind in zip(self.text(module).layers, text["layer_types"], strict=True)
        ]

    @override
    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        # Scaled by the square root of the width, in the type of the embedding.
        embedded = self.text(module).embed_tokens(tokens)
        return embedded * mx.array(embedded.shape[-1] ** 0.5, embedded.dtype)

    @override
    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        return tuple(
            rotary_factors(positions[0], base, width, dtype, factor)
            for base, factor, width in module._bases
        )

    @override
    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float = 0
    ) -> list[mx.array]:
        tower = module.vision_tower.vision_model
        positions = np.arange(len(tower.embeddings.position_embedding.weight), dtype=np.int32)
        return visual_features(
            prompts,
            images,
            lambda pixels, _: [
                module.multi_modal_projector(encode(tower, pixels, positions, device, recompute))
            ],
            device.pixel_bytes,
        )

    @override
    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        text, kinds = dict(config["text_config"]), config["text_config"].get("rope_parameters", {})
        for kind, name in (
            ("full_attention", "rope_global_base_freq"),
            ("sliding_attention", "rope_local_base_freq"),
        ):
            if "rope_theta" in kinds.get(kind, {}):
                text[name] = kinds[kind]["rope_theta"]
        if "mm_tokens_per_image" in config:
            text["mm_tokens_per_image"] = config["mm_tokens_per_image"]
        return {**config, "text_config": text}

    @override
    def patches(self, config: Mapping[str, Any], prompt: Prompt) -> list[tuple[int, int]]:
        return patches(config, prompt)


class _Module(DecoderLayer, Protocol):
    pre_feedforward_layernorm: Map
    post_feedforward_layernorm: Map


class FourNorms(NormedHeads):
    """Attention and feed-forward with a norm before and a norm after each."""

    module: _Module

    @override
    def finish(self, hidden: mx.array, mixed: mx.array, gate: mx.array | None) -> mx.array:
        layer = self.module
        hidden = hidden + layer.post_attention_layernorm(layer.self_attn.o_proj(mixed))
        fed = layer.mlp(layer.pre_feedforward_layernorm(hidden))
        return hidden + layer.post_feedforward_layernorm(fed)


def images(prompt: Prompt) -> ImageBatch:
    """The size in pixels and the values [3, H, W] of each image."""
    return [(image.shape[1:], image) for image in prompt.images["pixel_values"]]
