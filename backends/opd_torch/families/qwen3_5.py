"""Qwen3.5: gated delta nets, gated attention that rotates only a part of each head, and Qwen3-VL's
tower.

Source: `modeling_qwen3_5.py` of transformers 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_torch.batch import Visibility
from opd_torch.families.qwen3_vl import Qwen3VL
from opd_torch.layers.attention import NormedHeads
from opd_torch.layers.gated_delta import GatedDelta
from opd_torch.layers.layer import Layer


class Qwen35(Qwen3VL):
    """The family of Qwen3.5; its tower has no deepstack layers."""

    model_types = ("qwen3_5",)
    architecture = "Qwen3_5ForConditionalGeneration"

    def layers(self, module: Any) -> list[Layer]:
        """Layers of gated delta net and of gated attention."""
        return [
            GatedDelta(layer) if hasattr(layer, "linear_attn") else GatedHeads(layer, Visibility())
            for layer in self.text(module).layers
        ]


class GatedHeads(NormedHeads):
    """Attention whose output is multiplied by a gate. The projection of queries also computes the
    gate.
    """

    def query(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The queries [N, H, d] and the gate [N, H * d]."""
        attention = self.module.self_attn
        both = torch.unflatten(attention.q_proj(rows), -1, (-1, 2 * attention.head_dim))
        query, gate = both.chunk(2, -1)
        return query, gate.flatten(1)

    def finish(self, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """Multiplies `mixed` by the sigmoid of the gate, then finishes as attention does."""
        assert gate is not None
        return super().finish(hidden, mixed.reshape(len(hidden), -1) * torch.sigmoid(gate), None)
