"""The text half of a family. Most language trunks differ only in the norms and gates of layers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opd_torch.batch import Visibility
from opd_torch.kernels.rotary import rotary_factors
from opd_torch.layers.attention import AttentionLayer
from opd_torch.layers.layer import Angles, Layer
from opd_torch.layers.modules import Trunk


class Decoder:
    """The text half of `families.family.Family` for trunks like Llama's and Qwen's."""

    image_blocks = False

    attention: type[AttentionLayer] = AttentionLayer

    def text(self, module: Any) -> Trunk:
        """The language trunk."""
        trunk: Trunk = module.model.language_model
        return trunk

    def layers(self, module: Any) -> list[Layer]:
        """Layers of causal attention, limited to the window of a layer that has one."""
        return [
            self.attention(layer, Visibility(getattr(layer.self_attn, "sliding_window", None)))
            for layer in self.text(module).layers
        ]

    def embed(self, module: Any, tokens: Tensor) -> Tensor:
        """Embeddings [N, D]; a family that scales them does so in the embedding module."""
        return self.text(module).embed_tokens(tokens)

    def angles(self, module: Any, positions: Tensor, hidden: Tensor) -> tuple[Angles, ...]:
        """The rotary factors of all layers, which are the same."""
        positions = positions if len(positions) == 1 else positions[:, None]
        cosines, sines = self.text(module).rotary_emb(hidden[None], positions)
        return (rotary_factors(cosines[0, :, None], sines[0, :, None]),)
