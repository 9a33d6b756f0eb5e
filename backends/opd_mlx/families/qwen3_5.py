"""Qwen3.5: most layers are gated delta nets, which keep a state instead of keys; the others attend, with a gate on what they find.

The state after a prompt, and the last inputs of the short convolution, are what n completions start from.

Source: `modeling_qwen3_5.py` of transformers 5; the delta rule in chunks is mlx-vlm's.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens, K kernel of the convolution, C its channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx

from opd_mlx.batch import Rule
from opd_mlx.families.qwen3_vl import NormedHeads, Qwen3VL, head_counts
from opd_mlx.kernels.exponentials import exact_gelu, sigmoid
from opd_mlx.layers.gated_delta import GatedDelta
from opd_mlx.layers.layer import Layer


class Qwen35(Qwen3VL):
    """See `Family`. The tower is Qwen3-VL's, without features for further layers."""

    model_types = ("qwen3_5",)
    # As `sanitize` of mlx-vlm does; the norm in a delta net multiplies by its weight alone.
    raised = (
        ".input_layernorm.weight",
        ".post_attention_layernorm.weight",
        ".q_norm.weight",
        ".k_norm.weight",
        "language_model.norm.weight",
    )

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """See `Family`."""
        from mlx_vlm.models.gemma3.language import RMSNorm
        from mlx_vlm.models.qwen3_5 import Model, ModelConfig

        kinds = config["text_config"]["layer_types"]
        text = {**config["text_config"], "tie_word_embeddings": tied, "full_attention_interval": 1}
        text["rope_parameters"] = {**text["rope_parameters"], "type": "default"}
        vision = {**config["vision_config"], "model_type": "qwen3_5", "deepstack_visual_indexes": []}
        module = Model(ModelConfig.from_dict({**config, "text_config": text, "vision_config": vision}))
        args, model = module.language_model.args, module.language_model.model

        def centred(width: int) -> Any:
            """The model's norms multiply by 1 + weight, which mlx-vlm adds to the weight; a decay would pull that to another point."""
            norm = RMSNorm(width, args.rms_norm_eps)
            norm.weight = mx.zeros(width)
            return norm

        module.vision_tower.merger.act_fn = exact_gelu
        model.norm = centred(args.hidden_size)
        for layer, kind in zip(model.layers, kinds, strict=True):
            layer.input_layernorm, layer.post_attention_layernorm = centred(args.hidden_size), centred(args.hidden_size)
            if kind == "full_attention":
                layer.self_attn.q_norm, layer.self_attn.k_norm = centred(args.head_dim), centred(args.head_dim)
            else:
                from mlx_vlm.models.qwen3_5.language import Qwen3_5GatedDeltaNet

                layer.pop("self_attn")
                layer.linear_attn = Qwen3_5GatedDeltaNet(args)
        return module

    def layers(self, module: Any, config: Mapping[str, Any]) -> list[Layer]:
        """See `Family`."""
        return [
            GatedHeads(layer, *head_counts(config), layer.self_attn.scale, Rule()) if "self_attn" in layer else GatedDelta(layer)
            for layer in self.text(module).layers
        ]


class GatedHeads(NormedHeads):
    """What attention finds is multiplied by a gate, which the projection of queries gives beside them."""

    def query(self, rows: mx.array) -> tuple[mx.array, mx.array | None]:
        """See `AttentionLayer`."""
        query, gate = mx.split(self.module.self_attn.q_proj(rows).reshape(len(rows), self._heads, -1), 2, axis=-1)
        return self.module.self_attn.q_norm(query), gate.reshape(len(rows), -1)

    def finish(self, hidden: mx.array, mixed: mx.array, beside: mx.array | None) -> mx.array:
        """See `AttentionLayer`."""
        assert beside is not None
        return super().finish(hidden, mixed * sigmoid(beside), None)
