"""What most language trunks have in common: rotary positions, grouped queries, norms before attention and feed-forward.

Legend: see `opd_torch.families`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_torch.batch import Reach
from opd_torch.kernels.pointwise import feed_forward
from opd_torch.kernels.rotary import normed_turned, turns
from opd_torch.layers import attention
from opd_torch.layers.attention import Angles, KeysValues


class Decoder:
    """The text half of `opd_torch.families.Family`, as Llama and Qwen have it; biases are the projections' own."""

    def language(self, model: Any) -> Any:
        """The language trunk."""
        return model.model.language_model

    def angles(self, text: Any, positions: Tensor, hidden: Tensor) -> list[Angles]:
        """One rotation for all layers."""
        cosines, sines = text.rotary_emb(hidden[None], positions if len(positions) == 1 else positions[:, None])
        return [turns(cosines[0, :, None], sines[0, :, None])] * len(text.layers)

    def mixer(self, layer: Any) -> Any:
        """Attention."""
        return attention

    def reach(self, layer: Any) -> Reach:
        """Causal, within the layer's window where it has one."""
        return Reach(getattr(layer.self_attn, "sliding_window", None))

    def keys_values(self, layer: Any, normed: Tensor, angles: Angles) -> KeysValues:
        """Keys [N, G, d], with positions rotated in, and values."""
        module = layer.self_attn
        key, value = (project(normed).unflatten(-1, (-1, module.head_dim)) for project in (module.k_proj, module.v_proj))
        # Under autocast norms and rotations come out in float32.
        return normed_turned(key, self.key_norm(layer), angles).to(value.dtype), value

    def queries(self, layer: Any, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """Queries [N, H, d], with positions rotated in; no gate."""
        query = layer.self_attn.q_proj(normed).unflatten(-1, (-1, layer.self_attn.head_dim))
        return normed_turned(query, self.query_norm(layer), angles), None

    def key_norm(self, layer: Any) -> Any:
        """The norm of each head's keys; none."""
        return None

    def query_norm(self, layer: Any) -> Any:
        """The norm of each head's queries; none."""
        return None

    def finish(self, layer: Any, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """Output projection and feed-forward, both added to the rows."""
        hidden = hidden + layer.self_attn.o_proj(mixed.reshape(len(hidden), -1))
        return hidden + feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))


class NormedDecoder(Decoder):
    """With a norm over each head's keys and queries."""

    def key_norm(self, layer: Any) -> Any:
        """The norm of each head's keys."""
        return layer.self_attn.k_norm

    def query_norm(self, layer: Any) -> Any:
        """The norm of each head's queries."""
        return layer.self_attn.q_norm
