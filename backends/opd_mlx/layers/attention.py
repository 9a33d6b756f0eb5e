"""Two-stream attention: a prompt's tokens run once, and its n completions share their keys and
values.

A layer's `prefix` runs prompt tokens and returns their keys and values; `completion` runs
completion tokens over the keys of prompt and completion. Training runs both once; sampling runs
`prefix` once and `completion` token by token. Norms, projections and feed-forward are mlx-vlm's
modules and run on flat rows, so that each projection is one matrix product.

Legend: see `layer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from opd.types import IntArray
from opd_mlx.batch import Batch, DecodeStep, Masks, Prefixes, Visibility
from opd_mlx.device import Device
from opd_mlx.kernels.activations import swiglu
from opd_mlx.kernels.backward import traced
from opd_mlx.kernels.scores import attention
from opd_mlx.layers.layer import CompletionCache, KeysValues
from opd_mlx.layers.modules import DecoderLayer, FeedForward


def buffer_length(count: int, first: int) -> int:
    """The tokens of the buffer that holds `count` tokens: `first`, doubled until it suffices."""
    return int(first << max(0, -(-count // first) - 1).bit_length())


def attend(
    query: mx.array, key: mx.array, value: mx.array, scale: float, device: Device
) -> mx.array:
    """Attention of every query to every key, [batch, heads, tokens, width] each."""
    if device.fused_attention and not traced():
        from mlx_vlm.models.base import ensure_fused_sdpa

        # mlx-vlm pads head widths, such as 72, that Metal's fused kernel does not take.
        mixed: mx.array = ensure_fused_sdpa(query, key, value, scale)
        return mixed
    whole = slice(0, key.shape[-2]), None
    sources = [(key[:, :, None], value[:, :, None])]
    mixed = attention((query * scale)[:, :, None, None], sources, lambda rows: [whole], device)
    return mixed.reshape(query.shape)


@dataclass
class _Buffers:
    """The keys and values of completions, [B, H / G, n, buffer, E], with zeros behind the last
    token.
    """

    arrays: list[mx.array]
    first: int

    def append(self, keys: mx.array, values: mx.array, step: DecodeStep) -> KeysValues:
        """Adds the keys and values of one token [B, H / G, n, 1, E]; returns those of the first
        `step.count` tokens.
        """
        for place, new in enumerate((keys, values)):
            buffer = self.arrays[place]
            if step.count > buffer.shape[3]:
                more = buffer_length(step.count, self.first) - buffer.shape[3]
                buffer = mx.pad(buffer, [(0, 0)] * 3 + [(0, more), (0, 0)])
            self.arrays[place] = mx.slice_update(buffer, new, step.number, axes=(3,))
        keys, values = self.arrays
        return keys[..., : step.count, :], values[..., : step.count, :]

    def select_rows(self, prompts: mx.array, columns: mx.array) -> None:
        """Keeps only some prompts [B'], and of their completions some columns [B', n']."""
        places = columns[:, None, :, None, None]
        self.arrays[:] = [mx.take_along_axis(part[prompts], places, axis=2) for part in self.arrays]


class AttentionLayer:
    """A layer of attention and feed-forward; `layers.layer.Layer` describes the public methods.

    Families with other norms or gates override `normalised`, `query`, `key` and `finish`.
    """

    def __init__(
        self,
        module: DecoderLayer,
        text_config: Mapping[str, Any],
        visibility: Visibility,
        device: Device,
        rotary: int = 0,
    ) -> None:
        self.module, self.visibility, self.rotary = module, visibility, rotary
        self._heads = text_config["num_attention_heads"]
        self._keys = text_config["num_key_value_heads"]
        self._scale, self._device = module.self_attn.scale, device

    def normalised(self, hidden: mx.array) -> mx.array:
        """The rows after the norm before attention."""
        return self.module.input_layernorm(hidden)

    def query(self, rows: mx.array) -> tuple[mx.array, mx.array | None]:
        """The queries [rows, H, E] of normalised rows, before rotation, and the gate for `finish`
        or None.
        """
        return self.module.self_attn.q_proj(rows).reshape(len(rows), self._heads, -1), None

    def key(self, rows: mx.array) -> mx.array:
        """The keys [rows, H / G, E] of normalised rows, before rotation."""
        projected = self.module.self_attn.k_proj(rows)
        return projected.reshape(len(rows), self._keys, -1)

    def finish(self, hidden: mx.array, mixed: mx.array, gate: mx.array | None) -> mx.array:
        """Adds the projection of `mixed` [rows, H * E] and the feed-forward to the rows."""
        hidden = hidden + self.module.self_attn.o_proj(mixed)
        return hidden + feed_forward(self.module.mlp, self.module.post_attention_layernorm(hidden))

    def prefix(
        self,
        hidden: mx.array,
        angles: KeysValues,
        prefixes: Prefixes,
        mask: mx.array | None,
        last: bool,
    ) -> tuple[mx.array, KeysValues]:
        """Runs prompt rows [B * P, D]."""
        *projected, gate = self._project(self.normalised(hidden), angles)
        query, key, value = (
            rows.reshape(*prefixes.shape, *rows.shape[1:]).transpose(0, 2, 1, 3)
            for rows in projected
        )
        if last:
            return hidden, (key, value)
        if self._device.fused_attention and not traced():
            mixed = mx.fast.scaled_dot_product_attention(
                query, key, value, scale=self._scale, mask="causal" if mask is None else mask
            )
        else:
            scaled = query * self._scale
            grouped = scaled.reshape(query.shape[0], self._keys, 1, -1, *query.shape[2:])
            mixed = attention(
                grouped,
                [(key[:, :, None], value[:, :, None])],
                lambda rows: [prefixes.seen(self.visibility, rows)],
                self._device,
            ).reshape(query.shape)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(len(hidden), -1)
        return self.finish(hidden, mixed, gate), (key, value)

    def completion(
        self,
        hidden: mx.array,
        angles: KeysValues,
        shape: tuple[int, int, int],
        prefix: KeysValues,
        masks: Masks,
        cache: _Buffers | None,
        step: DecodeStep | None,
    ) -> mx.array:
        """Runs completion rows [B * n * T, D], or in a `step` the next row of every completion."""
        query, key, value, gate = self._completion_heads(hidden, angles, shape)
        if cache is not None and step is not None:
            key, value = cache.append(key, value, step)
            mixed = _decode_step(query * self._scale, prefix, (key, value), masks)
        else:
            shared = (prefix[0][:, :, None], prefix[1][:, :, None])
            sources = [(key, value), shared]
            mixed = attention(query * self._scale, sources, masks.seen, self._device)
        mixed = mixed.transpose(0, 2, 4, 1, 3, 5).reshape(len(hidden), -1)
        return self.finish(hidden, mixed, gate)

    def visual_weights(
        self, hidden: mx.array, angles: KeysValues, prefix: KeysValues, batch: Batch, masks: Masks
    ) -> list[mx.array]:
        """The weights [n, T, S] of completion rows on each prompt's visual tokens."""
        query, key, _, _ = self._completion_heads(hidden, angles, batch.shape)
        weights = []
        for number, prompt in enumerate(batch.prefixes.sources):
            inputs = (query * self._scale)[number], key[number], prefix[0][number]
            mask = None if masks.prefix is None else masks.prefix[number, 0, 0]
            weights.append(_visual_weights(*inputs, mask, masks.completion, prompt.visual.index))
        return weights

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """The empty cache of n completions of each prompt."""
        shapes = [(*part.shape[:2], n, 0, part.shape[-1]) for part in prefix]
        arrays = [mx.zeros(shape, part.dtype) for shape, part in zip(shapes, prefix, strict=True)]
        return _Buffers(arrays, self._device.cache_tokens)

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """Keys and values of all prompts, padded on the right to the longest."""
        width = max(keys.shape[2] for keys, _ in prefixes)

        def padded(part: mx.array) -> mx.array:
            return mx.pad(part, [(0, 0), (0, 0), (0, width - part.shape[2]), (0, 0)])

        keys = mx.concatenate([padded(keys) for keys, _ in prefixes])
        values = mx.concatenate([padded(values) for _, values in prefixes])
        return keys, values

    def _completion_heads(
        self, hidden: mx.array, angles: KeysValues, shape: tuple[int, int, int]
    ) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Rotated queries [B, H / G, n, G, T, E], rotated keys and values [B, H / G, n, T, E], and
        the gate. Of queries the axes n, G and T fold into one, so that the prompt's keys are read
        once.
        """
        query, key, value, gate = self._project(self.normalised(hidden), angles)
        key, value = (
            rows.reshape(*shape, *rows.shape[1:]).transpose(0, 3, 1, 2, 4) for rows in (key, value)
        )
        query = query.reshape(*shape, self._keys, self._heads // self._keys, -1)
        return query.transpose(0, 3, 1, 4, 2, 5), key, value, gate

    def _project(
        self, rows: mx.array, angles: KeysValues
    ) -> tuple[mx.array, mx.array, mx.array, mx.array | None]:
        """Rotated queries [rows, H, E], rotated keys and values [rows, H / G, E], and the gate."""
        query, gate = self.query(rows)
        value = self.module.self_attn.v_proj(rows).reshape(len(rows), self._keys, -1)
        return rotate(query, *angles), rotate(self.key(rows), *angles), value, gate


class NormedHeads(AttentionLayer):
    """Attention that normalises queries and keys head by head."""

    def query(self, rows: mx.array) -> tuple[mx.array, mx.array | None]:
        """Queries after the norm, before rotation."""
        query, gate = super().query(rows)
        return self.module.self_attn.q_norm(query), gate

    def key(self, rows: mx.array) -> mx.array:
        """Keys after the norm, before rotation."""
        return self.module.self_attn.k_norm(super().key(rows))


def feed_forward(module: FeedForward, rows: mx.array) -> mx.array:
    """Runs mlx-vlm's feed-forward with a SiLU gate."""
    return module.down_proj(swiglu(module.gate_proj(rows), module.up_proj(rows)))


def rotary_factors(
    positions: mx.array, base: float, width: int, dtype: mx.Dtype, factor: float = 1.0
) -> KeysValues:
    """Cosines and sines [rows, 1, width] at rotary `positions` [rows].

    Linear scaling divides the positions by `factor`.
    """
    exponents = mx.arange(0, width, 2, dtype=mx.float32) / width
    frequencies = 1.0 / base**exponents / factor
    angles = positions[:, None, None].astype(mx.float32) * mx.concatenate(
        [frequencies, frequencies]
    )
    return mx.cos(angles).astype(dtype), mx.sin(angles).astype(dtype)


def rotate(heads: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    """Rotates the first numbers of each head, as many as `cosines` and `sines` have."""
    rest = None
    if cosines.shape[-1] < heads.shape[-1]:
        heads, rest = mx.split(heads, [cosines.shape[-1]], axis=-1)
    first, second = mx.split(heads, 2, axis=-1)
    rotated = heads * cosines + mx.concatenate([-second, first], axis=-1) * sines
    return rotated if rest is None else mx.concatenate([rotated, rest], axis=-1)


def _visual_weights(
    query: mx.array,
    key: mx.array,
    prefix_key: mx.array,
    prefix_mask: mx.array | None,
    completion_mask: mx.array | None,
    visual: IntArray,
) -> mx.array:
    """The weights [n, T, S] of one prompt's completion rows on its `visual` tokens, averaged over
    heads, from one float32 softmax over the keys of prompt and completion.

    `query` [H / G, n, G, T, E] is scaled; the keys are [H / G, n, T, E] of the completions and
    [H / G, P, E] of the prompt. Computed for one key-value head at a time.
    """
    heads, n, groups, length, _ = query.shape
    total = mx.zeros((n, length, len(visual)))
    for head in range(heads):
        rows = query[head].astype(mx.float32)
        shared = rows @ prefix_key[head].astype(mx.float32).T
        alone = rows @ key[head].astype(mx.float32).swapaxes(-1, -2)[:, None]
        shared = shared if prefix_mask is None else shared + prefix_mask
        alone = alone if completion_mask is None else alone + completion_mask
        weights = mx.softmax(mx.concatenate([shared, alone], axis=-1), axis=-1)
        total = total + weights[..., mx.array(visual)].sum(axis=1)
        mx.eval(total)
    return total / (heads * groups)


def _decode_step(
    query: mx.array, prefix: KeysValues, completion: KeysValues, masks: Masks
) -> mx.array:
    """Attention of one row of every completion, with scaled queries [B, H / G, n, G, 1, E], over
    the keys of prompt and completion.

    A prompt's keys are read once for all of the prompt's n completions. Products are in the type of
    the keys, because casting the keys would copy them.
    """
    batch, heads, count, groups, _, width = query.shape
    folded = query.reshape(batch, heads, -1, width)
    shared = (folded @ prefix[0].swapaxes(-1, -2)).reshape(batch, heads, count, groups, -1)
    if masks.prefix is not None:
        shared = shared + masks.prefix.astype(shared.dtype)
    alone = query.squeeze(-2) @ completion[0].swapaxes(-1, -2)
    if masks.completion is not None:
        alone = alone + masks.completion.astype(alone.dtype)
    weights = mx.softmax(mx.concatenate([shared, alone], axis=-1), axis=-1, precise=True)
    shared, alone = mx.split(weights, [shared.shape[-1]], axis=-1)
    from_prefix = shared.reshape(batch, heads, count * groups, -1) @ prefix[1]
    mixed = from_prefix.reshape(batch, heads, count, groups, width) + alone @ completion[1]
    return mixed[..., None, :]
