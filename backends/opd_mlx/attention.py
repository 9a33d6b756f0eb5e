"""Two-stream attention: a prompt's tokens run once, and its n completions share their keys and values.

`prefix_layer` runs prompt tokens and gives their keys and values; `completion_layer` runs completion tokens over
`[prompt keys | own keys]`. Training runs the one and then the other; sampling keeps what the first gave and runs the second a
token at a time. Norms, projections and feed-forward are mlx-vlm's modules, on flat rows, so that each is one matrix product.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens (1 in decoding), H heads in G groups over H / G
key-value heads, E head width.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import mlx.core as mx

KeysValues: TypeAlias = tuple[mx.array, mx.array]
"""Keys, with positions rotated in, and values: [B, H / G, P, E] of prompts, [B, H / G, n, T, E] of completions."""

SLOW_EXPONENTIAL = platform.machine() == "x86_64" and mx.default_device() == mx.cpu
"""There MLX's exp takes 12 ns a number, which is most of an attention's time, and its power takes 5."""


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis, computed in float32."""
    return cast("mx.array", _softmax_by_power(scores)) if SLOW_EXPONENTIAL else mx.softmax(scores, axis=-1, precise=True)


def attend(query: mx.array, key: mx.array, value: mx.array, scale: float) -> mx.array:
    """Every query attends to every key, [batch, heads, tokens, width] each."""
    if SLOW_EXPONENTIAL:
        return softmax((query * scale) @ key.swapaxes(-1, -2)) @ value
    from mlx_vlm.models.base import ensure_fused_sdpa  # pads widths, such as 72, that Metal's fused kernel does not take

    return cast("mx.array", ensure_fused_sdpa(query, key, value, scale))


@dataclass
class Own:
    """A completion layer's own keys and values in decoding: buffers [B, H / G, n, max tokens, E], filled up to `length`."""

    keys: mx.array
    values: mx.array
    length: int = 0

    def append(self, keys: mx.array, values: mx.array) -> KeysValues:
        """Adds one token's keys and values [B, H / G, n, 1, E]; returns all so far."""
        self.keys[..., self.length : self.length + 1, :] = keys
        self.values[..., self.length : self.length + 1, :] = values
        self.length += 1
        return self.keys[..., : self.length, :], self.values[..., : self.length, :]


def rotary(language: Any, positions: mx.array, dtype: mx.Dtype) -> KeysValues:
    """Cosines and sines [rows, 1, E] of rotary positions [3, 1, rows]."""
    cosines, sines = language.layers[0].self_attn.rotary_emb(mx.zeros((), dtype), positions)
    return cosines[0, :, None], sines[0, :, None]


def prefix_layer(layer: Any, hidden: mx.array, angles: KeysValues, shape: tuple[int, int], last: bool) -> tuple[mx.array, KeysValues]:
    """Prompt rows [B * P, D] through one layer, causally; the rows after it, and its keys and values.

    After the last layer nobody reads a prompt's rows, so they are not computed there. `shape` is (B, P).
    """
    attention = layer.self_attn
    query, key, value = (
        rows.reshape(*shape, *rows.shape[1:]).transpose(0, 2, 1, 3) for rows in _project(attention, layer.input_layernorm(hidden), angles)
    )
    if last:
        return hidden, (key, value)
    mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=attention.scale, mask="causal")
    return _finish(layer, hidden, mixed.transpose(0, 2, 1, 3)), (key, value)


def completion_layer(
    layer: Any,
    hidden: mx.array,
    angles: KeysValues,
    shape: tuple[int, int, int],
    prefix: KeysValues,
    mask: mx.array | None,
    own: Own | None = None,
) -> mx.array:
    """Completion rows [B * n * T, D] through one layer. `shape` is (B, n, T).

    `prefix` and `mask` [B, 1, 1, 1, P] are the prompts' keys and values, and -inf where a prompt has ended. With `own`, earlier keys and
    values come from there and T is 1.
    """
    attention = layer.self_attn
    query, key, value = _project(attention, layer.input_layernorm(hidden), angles)
    key, value = (rows.reshape(*shape, *rows.shape[1:]).transpose(0, 3, 1, 2, 4) for rows in (key, value))
    groups, width = attention.n_heads // attention.n_kv_heads, attention.head_dim
    # [B, H / G, n, G, T, E]: so n, G and T fold into the queries of the prompt's keys, which are then read once.
    query = query.reshape(*shape, attention.n_kv_heads, groups, width).transpose(0, 3, 1, 4, 2, 5)
    if own is not None:
        key, value = own.append(key, value)
    mixed = _over_both(query * attention.scale, prefix, (key, value), mask)
    return _finish(layer, hidden, mixed.transpose(0, 2, 4, 1, 3, 5))


def _over_both(query: mx.array, prefix: KeysValues, own: KeysValues, mask: mx.array | None) -> mx.array:
    """Attention of queries [B, H / G, n, G, T, E] over the shared prefix and, causally, each completion's own keys: one softmax."""
    batch, heads, count, groups, length, width = query.shape
    rows = groups * length
    shared = (query.reshape(batch, heads, -1, width) @ prefix[0].swapaxes(-1, -2)).reshape(batch, heads, count, rows, -1)
    if mask is not None:
        shared = shared + mask.astype(shared.dtype)
    alone = query.reshape(batch, heads, count, rows, width) @ own[0].swapaxes(-1, -2)
    if length > 1:
        future = mx.arange(length)[:, None] < mx.arange(length)
        alone = mx.where(mx.tile(future, (groups, 1)), mx.array(-mx.inf, alone.dtype), alone)
    weights = softmax(mx.concatenate([shared, alone], axis=-1))
    shared, alone = mx.split(weights, [shared.shape[-1]], axis=-1)
    mixed = (shared.reshape(batch, heads, count * rows, -1) @ prefix[1]).reshape(batch, heads, count, rows, width) + alone @ own[1]
    return mixed.reshape(query.shape)


@mx.custom_function
def _softmax_by_power(scores: mx.array) -> mx.array:
    powers = mx.power(mx.array(math.e), (scores - scores.max(-1, keepdims=True)).astype(mx.float32))
    return (powers / powers.sum(-1, keepdims=True)).astype(scores.dtype)


@_softmax_by_power.vjp
def _softmax_slope(scores: mx.array, slope: mx.array, weights: mx.array) -> mx.array:
    weighted = slope * weights
    return weighted - weights * weighted.sum(-1, keepdims=True)


def _project(attention: Any, rows: mx.array, angles: KeysValues) -> tuple[mx.array, mx.array, mx.array]:
    """Queries [rows, H, E], keys and values [rows, H / G, E] of normalised rows [rows, D]; norms and positions in."""
    query = attention.q_norm(attention.q_proj(rows).reshape(len(rows), attention.n_heads, -1))
    key = attention.k_norm(attention.k_proj(rows).reshape(len(rows), attention.n_kv_heads, -1))
    value = attention.v_proj(rows).reshape(len(rows), attention.n_kv_heads, -1)
    return _rotate(query, *angles), _rotate(key, *angles), value


def _rotate(heads: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    first, second = mx.split(heads, 2, axis=-1)
    return heads * cosines + mx.concatenate([-second, first], axis=-1) * sines


def _finish(layer: Any, hidden: mx.array, mixed: mx.array) -> mx.array:
    """Output projection and feed-forward, both added to the rows."""
    hidden = hidden + layer.self_attn.o_proj(mixed.reshape(len(hidden), -1))
    out: mx.array = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
