"""Types for mlx-vlm's modules: the parts that the layers read, by mlx-vlm's names.

Legend: N rows, D hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import mlx.core as mx

Map: TypeAlias = Callable[[mx.array], mx.array]
"""A norm, a projection or an embedding, row by row."""


class FeedForward(Protocol):
    """A feed-forward with a gate."""

    gate_proj: Map
    up_proj: Map
    down_proj: Map

    def __call__(self, rows: mx.array, /) -> mx.array:
        """Runs rows [N, D]."""


class Attention(Protocol):
    """Self-attention. `q_norm` and `k_norm` exist only in families that normalise heads."""

    scale: float
    q_proj: Map
    k_proj: Map
    v_proj: Map
    o_proj: Map
    q_norm: Map
    k_norm: Map


class _Convolution(Protocol):
    """A convolution; `weight` is [channels, kernel, 1]."""

    weight: mx.array


class DeltaNet(Protocol):
    """A gated delta net."""

    num_v_heads: int
    num_k_heads: int
    head_k_dim: int
    head_v_dim: int
    key_dim: int
    conv_dim: int
    conv_kernel_size: int
    conv1d: _Convolution
    A_log: mx.array
    dt_bias: mx.array
    in_proj_qkv: Map
    in_proj_z: Map
    in_proj_a: Map
    in_proj_b: Map
    out_proj: Map
    norm: Callable[[mx.array, mx.array], mx.array]
    _normalize_qk: Callable[[mx.array, mx.array], tuple[mx.array, mx.array]]


class DecoderLayer(Protocol):
    """A layer of the language trunk, which has one of `self_attn` and `linear_attn`."""

    input_layernorm: Map
    post_attention_layernorm: Map
    self_attn: Attention
    linear_attn: DeltaNet
    mlp: FeedForward


class Trunk(Protocol):
    """The language trunk."""

    embed_tokens: Map
    layers: Sequence[Any]
    norm: Map
