"""Two-stream attention: a prompt's tokens run once, and its n completions share their keys and values.

`prefix_layer` runs prompt tokens and gives their keys and values; `completion_layer` runs completion tokens over
`[prompt keys | own keys]`. Training runs the one and then the other; sampling keeps what the first gave and runs the second a
token at a time. Norms, projections and feed-forward are transformers' modules, on packed rows; only attention sees padding.

Legend: N packed rows, B prompts, P longest prefix, R completions of all prompts, n of each where they are as many, T longest
completion, H query heads, G key-value heads, Q = H / G queries that share a key, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opd_torch.batch import Owner, Ragged

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Keys, with positions rotated in, and values: [B, G, P, d] of prefixes, [R, G, T, d] of completions."""

ROOM = 64
"""Tokens of a completion that fresh buffers hold; they double when they are full."""


@dataclass
class Own:
    """A completion layer's own keys and values in decoding: buffers [R, G, room, d], filled up to `length`."""

    keys: Tensor | None = None
    values: Tensor | None = None
    length: int = 0

    def append(self, key: Tensor, value: Tensor) -> KeysValues:
        """Adds one token's keys and values [R, G, d]; returns all so far."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_empty(*x.shape[:2], ROOM, x.shape[2]) for x in (key, value))
        elif self.length == self.keys.shape[2]:
            self.keys, self.values = (torch.cat([x, torch.empty_like(x)], 2) for x in (self.keys, self.values))
        self.keys[:, :, self.length] = key
        self.values[:, :, self.length] = value
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


def rotary(text: Any, positions: Tensor, hidden: Tensor) -> KeysValues:
    """Cosines and sines [N, 1, d], in the type of `hidden`, of rotary positions [3, N]."""
    cosines, sines = text.rotary_emb(hidden[None], positions[:, None])
    return cosines[0, :, None], sines[0, :, None]


def prefix_layer(layer: Any, hidden: Tensor, angles: KeysValues, prefixes: Ragged, last: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Prompt rows [N, D] through one layer, causally: the rows after it, and its keys and values.

    After the last layer nobody reads a prompt's rows, so they are not computed there.
    """
    normed = layer.input_layernorm(hidden)
    key, value = (prefixes.pad(x).transpose(1, 2) for x in _keys_values(layer.self_attn, normed, angles))
    if last:
        return hidden, key, value
    query = prefixes.pad(_queries(layer.self_attn, normed, angles).to(value.dtype)).transpose(1, 2)
    # Padding stands at the end, where causality alone keeps it from every real row.
    mixed = scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=layer.self_attn.scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return _finish(layer, hidden, prefixes.unpad(mixed.transpose(1, 2))), key, value


def completion_layer(
    layer: Any,
    hidden: Tensor,
    angles: KeysValues,
    prefix_key: Tensor,
    prefix_value: Tensor,
    completions: Ragged,
    owner: Owner,
    mask: Tensor,
) -> Tensor:
    """Completion rows [N, D] through one layer. `mask` [R or 1, 1, T, P + T] is True where a row may attend to [prefix | own]."""
    normed = layer.input_layernorm(hidden)
    key, value = (completions.pad(x).transpose(1, 2) for x in _keys_values(layer.self_attn, normed, angles))
    query = completions.pad(_queries(layer.self_attn, normed, angles).to(value.dtype))
    key, value = torch.cat([owner.spread(prefix_key), key], 2), torch.cat([owner.spread(prefix_value), value], 2)
    rows, length, heads, width = query.shape
    groups = key.shape[1]
    # Queries that share a key stand one after the other in one row, so that no key is repeated for them.
    query = query.view(rows, length, groups, -1, width).permute(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    mask = mask.repeat(1, 1, heads // groups, 1)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=layer.self_attn.scaling)
    mixed = mixed.view(rows, groups, -1, length, width).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, width)
    return _finish(layer, hidden, completions.unpad(mixed))


def decode_layer(layer: Any, hidden: Tensor, angles: KeysValues, prefix: KeysValues, mask: Tensor | None, own: Own) -> Tensor:
    """The next row of every completion [R, D] through one layer, n to a prompt; a prompt's keys are read once for all n.

    `mask` [B, 1, 1, P] is True at real keys of prefixes, or None where all are of one length.
    """
    attention = layer.self_attn
    normed = layer.input_layernorm(hidden)
    key, value = own.append(*_keys_values(attention, normed, angles))
    query = _queries(attention, normed, angles).to(value.dtype) * attention.scaling
    prompts, groups, longest, width = prefix[0].shape
    query = query.view(prompts, -1, groups, query.shape[1] // groups, width)
    n, shared = query.shape[1], query.shape[3]

    def fold(x: Tensor) -> Tensor:
        """[B, n, G, Q, ...] to [B, G, n * Q, ...]."""
        return x.transpose(1, 2).reshape(prompts, groups, n * shared, -1)

    def unfold(x: Tensor) -> Tensor:
        """[B, G, n * Q, ...] to [R, G, Q, ...]."""
        return x.view(prompts, groups, n, shared, -1).transpose(1, 2).reshape(prompts * n, groups, shared, -1)

    to_prefix = fold(query) @ prefix[0].transpose(2, 3)
    if mask is not None:
        to_prefix = to_prefix.masked_fill(~mask, float("-inf"))
    to_own = query.flatten(0, 1) @ key.transpose(2, 3)
    # One softmax over both parts, in float32.
    weights = torch.cat([unfold(to_prefix), to_own], -1).softmax(-1, dtype=torch.promote_types(value.dtype, torch.float32))
    of_prefix, of_own = weights.to(value.dtype).split([longest, key.shape[2]], -1)
    mixed = unfold(fold(of_prefix.unflatten(0, (prompts, n))) @ prefix[1]) + of_own @ value
    return _finish(layer, hidden, mixed)


def _keys_values(attention: Any, normed: Tensor, angles: KeysValues) -> KeysValues:
    """Keys and values [N, G, d] of normalised rows [N, D]."""
    value = attention.v_proj(normed).unflatten(-1, (-1, attention.head_dim))
    key = _rotate(attention.k_norm(attention.k_proj(normed).unflatten(-1, (-1, attention.head_dim))), angles)
    # Under autocast norms and rotations come out in float32.
    return key.to(value.dtype), value


def _queries(attention: Any, normed: Tensor, angles: KeysValues) -> Tensor:
    """Queries [N, H, d] of normalised rows [N, D]."""
    return _rotate(attention.q_norm(attention.q_proj(normed).unflatten(-1, (-1, attention.head_dim))), angles)


def _rotate(heads: Tensor, angles: KeysValues) -> Tensor:
    first, second = heads.chunk(2, -1)
    return torch.addcmul(heads * angles[0], torch.cat([-second, first], -1), angles[1])


def _finish(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    """Output projection and feed-forward, both added to the rows."""
    hidden = hidden + layer.self_attn.o_proj(mixed.reshape(len(hidden), -1))
    out: Tensor = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return out
