"""Qwen3.5: layers of gated delta net between layers of gated attention that turn only a part of each head; Qwen3-VL's tower.

Source: `modeling_qwen3_5.py` of transformers 5.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_torch.families.qwen3_vl import Qwen3VL
from opd_torch.kernels.rotary import normed_turned
from opd_torch.layers import attention, gated_delta
from opd_torch.layers.attention import Angles


class Qwen35(Qwen3VL):
    """See `opd_torch.families.Family`; its tower has no deepstack layers."""

    model_types = ("qwen3_5",)
    architecture = "Qwen3_5ForConditionalGeneration"

    def mixer(self, layer: Any) -> Any:
        """A recurrence or attention."""
        return gated_delta if hasattr(layer, "linear_attn") else attention

    def queries(self, layer: Any, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """Queries and their gate, head by head from one projection."""
        query, gate = layer.self_attn.q_proj(normed).unflatten(-1, (-1, 2 * layer.self_attn.head_dim)).chunk(2, -1)
        return normed_turned(query, self.query_norm(layer), angles), gate.flatten(1)

    def finish(self, layer: Any, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """As everywhere, from what the gate lets through."""
        assert gate is not None
        mixed = mixed.reshape(len(hidden), -1) * torch.sigmoid(gate)
        return super().finish(layer, hidden, mixed, None)
