"""Two-stream attention: a prompt's tokens run once, and its n completions share their keys and values.

A layer's `prefix` runs prompt tokens and gives their keys and values; its `completion` runs completion tokens over
`[prompt keys | own keys]`. Training runs the one and then the other; sampling keeps what the first gave and runs the second a
token at a time. Norms, projections and feed-forward are mlx-vlm's modules, on flat rows, so that each is one matrix product.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens (1 in decoding), H heads in G groups over H / G
key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from opd_mlx.batch import Masks, Prefixes, Rule, Step
from opd_mlx.kernels.backward import traced
from opd_mlx.kernels.exponentials import softmax, swiglu
from opd_mlx.kernels.scores import attention
from opd_mlx.layers.layer import KeysValues

FUSED = mx.default_device() == mx.gpu
"""Where MLX's own attention keeps no scores, as long as there is no gradient."""

ROOM = 64
"""Tokens of the first buffer of a completion's keys; each further one is twice as long."""


def room(count: int) -> int:
    """Length of the buffer that holds `count` tokens."""
    return int(ROOM << max(0, -(-count // ROOM) - 1).bit_length())


def attend(query: mx.array, key: mx.array, value: mx.array, scale: float) -> mx.array:
    """Every query attends to every key, [batch, heads, tokens, width] each."""
    if FUSED and not traced():
        from mlx_vlm.models.base import ensure_fused_sdpa  # pads widths, such as 72, that Metal's fused kernel does not take

        return cast("mx.array", ensure_fused_sdpa(query, key, value, scale))
    whole = slice(0, key.shape[-2]), None
    return attention((query * scale)[:, :, None, None], [(key[:, :, None], value[:, :, None])], lambda rows: [whole]).reshape(query.shape)


@dataclass
class OwnKeys:
    """A completion layer's own keys and values in decoding: buffers [B, H / G, n, room, E], with zeros where no token stands yet."""

    arrays: list[mx.array]

    def append(self, keys: mx.array, values: mx.array, step: Step) -> KeysValues:
        """Adds one token's keys and values [B, H / G, n, 1, E]; returns the first `step.count` of all."""
        for which, new in enumerate((keys, values)):
            held = self.arrays[which]
            if step.count > held.shape[3]:
                held = mx.pad(held, [(0, 0)] * 3 + [(0, room(step.count) - held.shape[3]), (0, 0)])
            self.arrays[which] = mx.slice_update(held, new, step.number, axes=(3,))
        keys, values = self.arrays
        return keys[..., : step.count, :], values[..., : step.count, :]

    def keep(self, prompts: mx.array, columns: mx.array) -> None:
        """See `Own`."""
        places = columns[:, None, :, None, None]
        self.arrays[:] = [mx.take_along_axis(part[prompts], places, axis=2) for part in self.arrays]


class AttentionLayer:
    """See `Layer`. A family with other norms, gates or masks overrides what is below."""

    def __init__(self, module: Any, heads: int, keys: int, scale: float, rule: Rule, rotary: int = 0) -> None:
        self.module, self.rule, self.rotary = module, rule, rotary
        self._heads, self._keys, self._scale = heads, keys, scale

    def normalised(self, hidden: mx.array) -> mx.array:
        """Rows as the projections take them."""
        return cast("mx.array", self.module.input_layernorm(hidden))

    def query(self, rows: mx.array) -> tuple[mx.array, mx.array | None]:
        """Queries [rows, H, E] of normalised rows, without positions, and what `finish` needs beside them."""
        return self.module.self_attn.q_proj(rows).reshape(len(rows), self._heads, -1), None

    def key(self, rows: mx.array) -> mx.array:
        """Keys [rows, H / G, E] of normalised rows, without positions."""
        return cast("mx.array", self.module.self_attn.k_proj(rows).reshape(len(rows), self._keys, -1))

    def finish(self, hidden: mx.array, mixed: mx.array, beside: mx.array | None) -> mx.array:
        """Output projection of `mixed` [rows, H * E] and feed-forward, both added to the rows."""
        hidden = hidden + self.module.self_attn.o_proj(mixed)
        return hidden + feed_forward(self.module.mlp, self.module.post_attention_layernorm(hidden))

    def prefix(
        self, hidden: mx.array, angles: KeysValues, prefixes: Prefixes, mask: mx.array | None, last: bool
    ) -> tuple[mx.array, KeysValues]:
        """See `Layer`."""
        query, key, value, beside = self._project(self.normalised(hidden), angles)
        query, key, value = (rows.reshape(*prefixes.shape, *rows.shape[1:]).transpose(0, 2, 1, 3) for rows in (query, key, value))
        if last:
            return hidden, (key, value)
        if FUSED and not traced():
            mixed = mx.fast.scaled_dot_product_attention(query, key, value, scale=self._scale, mask="causal" if mask is None else mask)
        else:
            grouped = (query * self._scale).reshape(query.shape[0], self._keys, 1, -1, *query.shape[2:])
            mixed = attention(grouped, [(key[:, :, None], value[:, :, None])], lambda rows: [prefixes.seen(self.rule, rows)]).reshape(
                query.shape
            )
        return self.finish(hidden, mixed.transpose(0, 2, 1, 3).reshape(len(hidden), -1), beside), (key, value)

    def completion(
        self,
        hidden: mx.array,
        angles: KeysValues,
        shape: tuple[int, int, int],
        prefix: KeysValues,
        masks: Masks,
        own: OwnKeys | None,
        step: Step | None,
    ) -> mx.array:
        """See `Layer`."""
        query, key, value, beside = self._project(self.normalised(hidden), angles)
        key, value = (rows.reshape(*shape, *rows.shape[1:]).transpose(0, 3, 1, 2, 4) for rows in (key, value))
        # [B, H / G, n, G, T, E]: so n, G and T fold into the queries of the prompt's keys, which are then read once.
        query = query.reshape(*shape, self._keys, self._heads // self._keys, -1).transpose(0, 3, 1, 4, 2, 5)
        if own is not None and step is not None:
            key, value = own.append(key, value, step)
            mixed = _one_more(query * self._scale, prefix, (key, value), masks)
        else:
            once = (prefix[0][:, :, None], prefix[1][:, :, None])
            mixed = attention(query * self._scale, [(key, value), once], masks.seen)
        return self.finish(hidden, mixed.transpose(0, 2, 4, 1, 3, 5).reshape(len(hidden), -1), beside)

    def begin(self, prefix: KeysValues, n: int) -> OwnKeys:
        """See `Layer`."""
        return OwnKeys([mx.zeros((*part.shape[:2], n, 0, part.shape[-1]), part.dtype) for part in prefix])

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """See `Layer`: padded on the right, like the prompts."""
        width = max(keys.shape[2] for keys, _ in prefixes)
        keys, values = (
            mx.concatenate([mx.pad(part, [(0, 0), (0, 0), (0, width - part.shape[2]), (0, 0)]) for part in parts])
            for parts in zip(*prefixes, strict=True)
        )
        return keys, values

    def _project(self, rows: mx.array, angles: KeysValues) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Queries [rows, H, E], keys and values [rows, H / G, E] of normalised rows [rows, D], positions in; and what is beside."""
        query, beside = self.query(rows)
        value = self.module.self_attn.v_proj(rows).reshape(len(rows), self._keys, -1)
        return rotate(query, *angles), rotate(self.key(rows), *angles), value, beside


def feed_forward(module: Any, rows: mx.array) -> mx.array:
    """mlx-vlm's feed-forward with a gate by SiLU."""
    return cast("mx.array", module.down_proj(swiglu(module.gate_proj(rows), module.up_proj(rows))))


def angles_at(positions: mx.array, base: float, width: int, dtype: mx.Dtype, factor: float = 1.0) -> KeysValues:
    """Cosines and sines [rows, 1, width] of rotary `positions` [rows], divided by `factor` (linear scaling)."""
    frequencies = 1.0 / base ** (mx.arange(0, width, 2, dtype=mx.float32) / width) / factor
    turns = positions[:, None, None].astype(mx.float32) * mx.concatenate([frequencies, frequencies])
    return mx.cos(turns).astype(dtype), mx.sin(turns).astype(dtype)


def rotate(heads: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotates the first of the heads' widths, as many as there are angles."""
    turned, rest = mx.split(heads, [cosines.shape[-1]], axis=-1) if cosines.shape[-1] < heads.shape[-1] else (heads, None)
    first, second = mx.split(turned, 2, axis=-1)
    turned = turned * cosines + mx.concatenate([-second, first], axis=-1) * sines
    return turned if rest is None else mx.concatenate([turned, rest], axis=-1)


def _one_more(query: mx.array, prefix: KeysValues, own: KeysValues, masks: Masks) -> mx.array:
    """Attention of one token of each completion, [B, H / G, n, G, 1, E], over the shared prefix and its completion's own keys.

    Products are in the type of the keys, of which a cast would be as large as they are.
    """
    batch, heads, count, groups, _, width = query.shape
    shared = (query.reshape(batch, heads, -1, width) @ prefix[0].swapaxes(-1, -2)).reshape(batch, heads, count, groups, -1)
    if masks.prefix is not None:
        shared = shared + masks.prefix.astype(shared.dtype)
    alone = query.squeeze(-2) @ own[0].swapaxes(-1, -2)
    if masks.own is not None:
        alone = alone + masks.own.astype(alone.dtype)
    weights = softmax(mx.concatenate([shared, alone], axis=-1))
    shared, alone = mx.split(weights, [shared.shape[-1]], axis=-1)
    mixed = (shared.reshape(batch, heads, count * groups, -1) @ prefix[1]).reshape(batch, heads, count, groups, width) + alone @ own[1]
    return mixed[..., None, :]
