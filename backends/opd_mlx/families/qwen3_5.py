"""Qwen3.5: gated delta nets, gated attention that rotates only a part of each head, and Qwen3-VL's
tower.

Source: `modeling_qwen3_5.py` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
from typing_extensions import override

from opd_mlx.batch import Visibility
from opd_mlx.device import Device
from opd_mlx.families.qwen3_vl import Qwen3VL
from opd_mlx.kernels.activations import exact_gelu
from opd_mlx.layers.attention import NormedHeads
from opd_mlx.layers.gated_delta import GatedDelta
from opd_mlx.layers.layer import Layer


class Qwen35(Qwen3VL):
    """The family of Qwen3.5; its tower has no deepstack layers."""

    model_types = ("qwen3_5",)
    # As in mlx-vlm's `sanitize`. The norm in a delta net multiplies by the weight, without the 1.
    raised = (
        ".input_layernorm.weight",
        ".post_attention_layernorm.weight",
        ".q_norm.weight",
        ".k_norm.weight",
        "language_model.norm.weight",
    )

    @override
    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        from mlx_vlm.models.gemma3.language import RMSNorm
        from mlx_vlm.models.qwen3_5 import Model, ModelConfig

        text = {
            **config["text_config"],
            "tie_word_embeddings": tied,
            "full_attention_interval": 1,
            "rope_parameters": {**config["text_config"]["rope_parameters"], "type": "default"},
        }
        vision = {
            **config["vision_config"],
            "model_type": "qwen3_5",
            "deepstack_visual_indexes": [],
        }
        module = Model(
            ModelConfig.from_dict({**config, "text_config": text, "vision_config": vision})
        )
        args, model = module.language_model.args, module.language_model.model

        def centred(width: int) -> Any:
            # The model's norms multiply by 1 + weight. mlx-vlm adds the 1 to the weight; weight
            # decay would then pull the factor to 0 instead of 1.
            norm = RMSNorm(width, args.rms_norm_eps)
            norm.weight = mx.zeros(width)
            return norm

        module.vision_tower.merger.act_fn = exact_gelu
        model.norm = centred(args.hidden_size)
        for layer, kind in zip(model.layers, text["layer_types"], strict=True):
            layer.input_layernorm = centred(args.hidden_size)
            layer.post_attention_layernorm = centred(args.hidden_size)
            if kind == "full_attention":
                layer.self_attn.q_norm = centred(args.head_dim)
                layer.self_attn.k_norm = centred(args.head_dim)
            else:
                from mlx_vlm.models.qwen3_5.language import Qwen3_5GatedDeltaNet

                layer.pop("self_attn")
                layer.linear_attn = Qwen3_5GatedDeltaNet(args)
        return module

    @override
    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        text = config["text_config"]
        return [
            GatedHeads(layer, text, Visibility(), device)
            if "self_attn" in layer
            else GatedDelta(layer, device)
            for layer in self.text(module).layers
        ]


class GatedHeads(NormedHeads):
    """Attention whose output is multiplied by a gate. The projection of queries also computes the
    gate.
    """

    @override
    def query(self, rows: mx.array) -> tuple[mx.array, mx.array | None]:
        projected = self.module.self_attn.q_proj(rows).reshape(len(rows), self._heads, -1)
        query, gate = mx.split(projected, 2, axis=-1)
        return self.module.self_attn.q_norm(query), gate.reshape(len(rows), -1)

    @override
    def finish(self, hidden: mx.array, mixed: mx.array, gate: mx.array | None) -> mx.array:
        assert gate is not None
        return super().finish(hidden, mixed * mx.sigmoid(gate), None)
