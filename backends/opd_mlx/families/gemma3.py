"""Gemma 3: sliding windows in most layers, images that see themselves in both directions, four norms a layer, two rotary bases.

Source: `modeling_gemma3.py` of transformers 5. mlx-vlm's own forward has one mask for all layers and rounds the embeddings' scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
import numpy as np

from opd.types import Prompt
from opd_mlx.batch import Rule
from opd_mlx.families.qwen3_vl import NormedHeads, head_counts
from opd_mlx.families.siglip import encode, tower_bytes
from opd_mlx.layers.attention import angles_at
from opd_mlx.layers.layer import KeysValues, Layer
from opd_mlx.vision import Piece, visual_features

KINDS = ("sliding_attention", "full_attention")
"""Types of layers, each with rotary angles of its own."""


class Gemma3:
    """See `Family`."""

    model_types = ("gemma3",)
    names: Mapping[str, str] = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.vision_model.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    raised: tuple[str, ...] = ()
    vision = ("vision_tower.", "multi_modal_projector.")

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """See `Family`."""
        from mlx_vlm.models.gemma3 import Model, ModelConfig, TextConfig, VisionConfig

        text, vision = config["text_config"], config["vision_config"]
        args = TextConfig.from_dict({**text, "mm_tokens_per_image": config["mm_tokens_per_image"]})
        module = Model(ModelConfig(args, VisionConfig.from_dict(vision), "gemma3", vocab_size=text["vocab_size"]))
        module.vision_tower.vision_model.post_layernorm.eps = vision["layer_norm_eps"]
        if tied:
            module.language_model.pop("lm_head")
        # Kept beside the parameters: MLX takes names that begin with an underscore for none.
        module._bases = [
            (text["rope_parameters"][kind]["rope_theta"], text["rope_parameters"][kind].get("factor", 1.0), text["head_dim"])
            for kind in KINDS
        ]
        return module

    def text(self, module: Any) -> Any:
        """See `Family`."""
        return module.language_model.model

    def layers(self, module: Any, config: Mapping[str, Any]) -> list[Layer]:
        """See `Family`."""
        text = config["text_config"]
        rules = {"sliding_attention": Rule(text["sliding_window"], blocks=True), "full_attention": Rule(blocks=True)}
        return [
            FourNorms(layer, *head_counts(config), layer.self_attn.scale, rules[kind], KINDS.index(kind))
            for layer, kind in zip(self.text(module).layers, text["layer_types"], strict=True)
        ]

    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        """Scaled by the root of the width, in the type of the embedding."""
        embedded = module.language_model.model.embed_tokens(tokens)
        return cast("mx.array", embedded * mx.array(embedded.shape[-1] ** 0.5, embedded.dtype))

    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        """One kind for each of KINDS."""
        return tuple(angles_at(positions[0], base, width, dtype, factor) for base, factor, width in module._bases)

    def features(self, module: Any, prompts: Sequence[Prompt], again: float = 0) -> list[mx.array]:
        """See `Family`."""
        tower = module.vision_tower.vision_model
        places = np.arange(len(tower.embeddings.position_embedding.weight), dtype=np.int32)
        return visual_features(prompts, images, lambda found, _: [module.multi_modal_projector(encode(tower, found, again, places))])

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """See `Family`."""
        text, kinds = dict(config["text_config"]), config["text_config"].get("rope_parameters", {})
        for kind, name in (("full_attention", "rope_global_base_freq"), ("sliding_attention", "rope_local_base_freq")):
            if "rope_theta" in kinds.get(kind, {}):
                text[name] = kinds[kind]["rope_theta"]
        if "mm_tokens_per_image" in config:
            text["mm_tokens_per_image"] = config["mm_tokens_per_image"]
        return {**config, "text_config": text}

    def vision_bytes(self, config: Mapping[str, Any], prompt: Prompt, itemsize: int) -> int:
        """See `Family`."""
        return tower_bytes(config, prompt, itemsize)


class FourNorms(NormedHeads):
    """What attention and feed-forward give is normalised before it is added."""

    def finish(self, hidden: mx.array, mixed: mx.array, beside: mx.array | None) -> mx.array:
        """See `AttentionLayer`."""
        layer = self.module
        hidden = hidden + layer.post_attention_layernorm(layer.self_attn.o_proj(mixed))
        out: mx.array = hidden + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(hidden)))
        return out


def images(prompt: Prompt) -> list[Piece]:
    """Height and width, and values [3, height, width], of each image."""
    return [(image.shape[1:], image) for image in prompt.images["pixel_values"]]
