"""Types for transformers' modules: the parts that the layers read, by transformers' names.

Legend: N rows, D hidden width, H * d the width of all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

Map: TypeAlias = Callable[[Tensor], Tensor]
"""A norm, a projection or an embedding, row by row."""


class FeedForward(Protocol):
    """A feed-forward. One without a gate does not have the three projections."""

    gate_proj: Map
    up_proj: Map
    down_proj: Map

    def __call__(self, rows: Tensor, /) -> Tensor:
        """Runs rows [N, D]."""


class Attention(Protocol):
    """Self-attention. `q_norm` and `k_norm` exist only in families that normalise heads."""

    head_dim: int
    scaling: float
    q_proj: Map
    k_proj: Map
    v_proj: Map
    o_proj: Map
    q_norm: Map
    k_norm: Map


class DeltaNet(Protocol):
    """A gated delta net."""

    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    key_dim: int
    value_dim: int
    conv_kernel_size: int
    activation: str
    conv1d: nn.Conv1d
    A_log: Tensor
    dt_bias: Tensor
    in_proj_qkv: Map
    in_proj_z: Map
    in_proj_a: Map
    in_proj_b: Map
    out_proj: Map
    norm: Callable[[Tensor, Tensor], Tensor]


class DecoderLayer(Protocol):
    """A layer of the language trunk, which has one of `self_attn` and `linear_attn`."""

    input_layernorm: Map
    post_attention_layernorm: Map
    self_attn: Attention
    linear_attn: DeltaNet
    mlp: FeedForward


class Trunk(Protocol):
    """The language trunk; `rotary_emb` computes cosines and sines."""

    config: Any
    embed_tokens: Map
    layers: Sequence[Any]
    norm: Map
    rotary_emb: Callable[..., tuple[Tensor, Tensor]]
