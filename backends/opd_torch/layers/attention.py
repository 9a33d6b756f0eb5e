"""Two-stream attention: a prompt's tokens run once, and its n completions share their keys and
values.

Norms, projections and feed-forward are transformers' modules and run on packed rows; only attention
runs on padded rows.

Legend: see `layers.layer`; Q = H / G query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from opd_torch.batch import Batch, DecodeStep, Prefixes, Visibility
from opd_torch.kernels.flash import joinable
from opd_torch.kernels.joined import joined
from opd_torch.kernels.pointwise import feed_forward
from opd_torch.kernels.rotary import normed_rotated
from opd_torch.layers.layer import Angles, KeysValues, stack_prompts
from opd_torch.layers.modules import DecoderLayer, Map
from opd_torch.ragged import index_tensor


def buffer_length(count: int, first: int) -> int:
    """The tokens of the buffer that holds `count` tokens: `first`, doubled until it suffices."""
    return int(first << max(0, -(-count // first) - 1).bit_length())


class _KeyCache:
    """The keys and values of completions, [R, G, buffer, d], with zeros behind the last token."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def append(self, key: Tensor, value: Tensor, step: DecodeStep) -> KeysValues:
        """Adds the keys and values of one token [R, G, d]; returns those of the first `step.count`
        tokens.
        """
        if step.count > self.keys.shape[2]:
            more = (0, 0, 0, step.buffer - self.keys.shape[2])
            self.keys, self.values = pad(self.keys, more), pad(self.values, more)
        self.keys.index_copy_(2, step.number, key[:, :, None])
        self.values.index_copy_(2, step.number, value[:, :, None])
        return self.keys[:, :, : step.count], self.values[:, :, : step.count]

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the completions `rows`, indices into R."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


class AttentionLayer:
    """A layer of attention and feed-forward; `layers.layer.Layer` describes the public methods.

    Families with other norms or gates override `key_norm`, `query_norm`, `query` and `finish`.
    """

    def __init__(self, module: DecoderLayer, visibility: Visibility, rotary: int = 0) -> None:
        self.module, self.visibility, self.rotary = module, visibility, rotary

    @property
    def key_norm(self) -> Map | None:
        """The norm over each head of keys; None without a norm."""
        return None

    @property
    def query_norm(self) -> Map | None:
        """The norm over each head of queries; None without a norm."""
        return None

    def query(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """The queries [N, H, d] of normalised rows [N, D], before `query_norm` and rotation, and
        the gate [N, H * d] for `finish`, or None.
        """
        attention = self.module.self_attn
        return torch.unflatten(attention.q_proj(rows), -1, (-1, attention.head_dim)), None

    def finish(self, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """Adds the projection of `mixed` [N, H, d] and the feed-forward to the rows [N, D]."""
        hidden = hidden + self.module.self_attn.o_proj(mixed.reshape(len(hidden), -1))
        normed = self.module.post_attention_layernorm(hidden)
        return hidden + feed_forward(self.module.mlp, normed)

    def prefix(
        self, hidden: Tensor, angles: Angles, prefixes: Prefixes, last: bool
    ) -> tuple[Tensor, KeysValues]:
        """Runs prompt rows [N, D]."""
        ragged, normed = prefixes.ragged, self.module.input_layernorm(hidden)
        key, value = (ragged.pad(x).transpose(1, 2) for x in self._keys_values(normed, angles))
        if last:
            return hidden, (key, value)
        query, gate = self._queries(normed, angles)
        query = ragged.pad(query.to(value.dtype)).transpose(1, 2)
        mask = prefixes.mask(self.visibility)
        mixed = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.module.self_attn.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return self.finish(hidden, ragged.unpad(mixed.transpose(1, 2)), gate), (key, value)

    def completion(
        self,
        hidden: Tensor,
        angles: Angles,
        prefix: KeysValues,
        batch: Batch,
        cache: _KeyCache | None = None,
        step: DecodeStep | None = None,
    ) -> Tensor:
        """Runs completion rows [M, D], or in a `step` the next row of every completion."""
        normed = self.module.input_layernorm(hidden)
        key, value = self._keys_values(normed, angles)
        if cache is not None and step is not None:
            key, value = cache.append(key, value, step)
        query, gate = self._queries(normed, angles)
        query, scale = query.to(value.dtype), self.module.self_attn.scaling
        if cache is not None and step is not None:
            masks = step.masks(batch.prefixes, self.visibility)
            mixed = _decode_step(query * scale, prefix, (key, value), masks)
        elif self.visibility.window is None and joinable(query, key):
            mixed = joined(query, key, value, *prefix, batch, scale)
        else:
            mixed = _masked(query, key, value, prefix, batch, batch.mask(self.visibility), scale)
        return self.finish(hidden, mixed, gate)

    def visual_weights(
        self, hidden: Tensor, angles: Angles, prefix: KeysValues, batch: Batch
    ) -> list[Tensor]:
        """The weights [T, S] of each completion's rows on its prompt's visual tokens."""
        normed = self.module.input_layernorm(hidden)
        keys, _ = self._keys_values(normed, angles)
        queries, _ = self._queries(normed, angles)
        queries = queries * self.module.self_attn.scaling
        return _visual_weights(queries, keys, prefix[0], batch, batch.mask(self.visibility))

    def begin(self, prefix: KeysValues, n: int) -> _KeyCache:
        """The empty cache of n completions of each prompt."""
        return _KeyCache(*(x.new_zeros(len(x) * n, x.shape[1], 0, x.shape[3]) for x in prefix))

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """Keys and values of all prompts, padded on the right to the longest."""
        keys, values = map(stack_prompts, zip(*prefixes, strict=True))
        return keys, values

    def _keys_values(self, normed: Tensor, angles: Angles) -> KeysValues:
        """The rotated keys, and the values, [N, G, d] each, of normalised rows [N, D]."""
        attention = self.module.self_attn
        key, value = (
            torch.unflatten(project(normed), -1, (-1, attention.head_dim))
            for project in (attention.k_proj, attention.v_proj)
        )
        # Under autocast norms and rotations come out in float32.
        return normed_rotated(key, self.key_norm, angles).to(value.dtype), value

    def _queries(self, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """Queries [N, H, d] of normalised rows [N, D], with positions rotated in, and the gate."""
        query, gate = self.query(normed)
        return normed_rotated(query, self.query_norm, angles), gate


class NormedHeads(AttentionLayer):
    """Attention with a norm over each head's keys and queries."""

    @property
    def key_norm(self) -> Map:
        """The norm over each head of keys."""
        return self.module.self_attn.k_norm

    @property
    def query_norm(self) -> Map:
        """The norm over each head of queries."""
        return self.module.self_attn.q_norm


def _masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix: KeysValues,
    batch: Batch,
    mask: Tensor,
    scale: float,
) -> Tensor:
    """Attention of completion rows [M, H, d] under `mask`, with a copy of the prompt's keys in
    front of each completion's keys.
    """
    of_prefix = (batch.owner.spread(x) for x in prefix)
    of_completion = (batch.ragged.pad(x).transpose(1, 2) for x in (key, value))
    key, value = (torch.cat(both, 2) for both in zip(of_prefix, of_completion, strict=True))
    query = batch.ragged.pad(query)
    rows, length, heads, width = query.shape
    groups = key.shape[1]
    # Query heads that share a key-value head become consecutive rows, so no key is repeated.
    query = query.view(rows, length, groups, -1, width).permute(0, 2, 3, 1, 4)
    query = query.reshape(rows, groups, -1, width)
    mask = mask.repeat(1, 1, heads // groups, 1)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    mixed = mixed.view(rows, groups, -1, length, width).permute(0, 3, 1, 2, 4)
    return batch.ragged.unpad(mixed.reshape(rows, length, heads, width))


def _visual_weights(
    queries: Tensor, keys: Tensor, prefix_keys: Tensor, batch: Batch, masks: Tensor
) -> list[Tensor]:
    """The weights [T, S] of completion rows with scaled `queries` [M, H, d] on visual tokens,
    averaged over heads, from one softmax over the keys of prompt and completion in float32 or
    better.

    Computed for one completion and one key-value head at a time.
    """
    precision = torch.promote_types(keys.dtype, torch.float32)
    heads, groups, longest = queries.shape[1], keys.shape[1], prefix_keys.shape[2]
    lengths, owners = batch.ragged.lengths.tolist(), batch.owner.index.tolist()
    weights = []
    rows = zip(torch.split(queries, lengths), torch.split(keys, lengths), owners, strict=True)
    # Autocast would round the scores to half precision.
    with torch.autocast(queries.device.type, enabled=False):
        for number, (query, key, owner) in enumerate(rows):
            visual = index_tensor(batch.prefixes.sources[owner].visual.index, keys.device)
            seen = masks[number if len(masks) > 1 else 0, 0, : len(query), : longest + len(query)]
            query = query.view(len(query), groups, heads // groups, -1).to(precision)
            total = query.new_zeros(len(query), len(visual))
            for group in range(groups):
                every = torch.cat([prefix_keys[owner, group], key[:, group]]).to(precision)
                scores = (query[:, group] @ every.T).masked_fill(~seen[:, None], float("-inf"))
                total += scores.softmax(-1).index_select(-1, visual).sum(1)
            weights.append(total / heads)
    return weights


def _decode_step(
    query: Tensor,
    prefix: KeysValues,
    completion: KeysValues,
    masks: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """Attention of one row of every completion, with scaled queries [R, H, d], over the keys of
    prompt and completion.

    A prompt's keys are read once for all of the prompt's n completions. `DecodeStep.masks` makes
    the `masks`.
    """
    prompt_mask, completion_mask = masks
    prompts, groups, longest, width = prefix[0].shape
    query = query.view(prompts, -1, groups, query.shape[1] // groups, width)
    n, shared = query.shape[1], query.shape[3]

    def fold(x: Tensor) -> Tensor:
        """[B, n, G, Q, ...] to [B, G, n * Q, ...]."""
        return x.transpose(1, 2).reshape(prompts, groups, n * shared, -1)

    def unfold(x: Tensor) -> Tensor:
        """[B, G, n * Q, ...] to [R, G, Q, ...]."""
        x = x.view(prompts, groups, n, shared, -1).transpose(1, 2)
        return x.reshape(prompts * n, groups, shared, -1)

    to_prefix = fold(query) @ prefix[0].transpose(2, 3)
    if prompt_mask is not None:
        to_prefix = to_prefix.masked_fill(~prompt_mask, float("-inf"))
    keys, values = completion
    to_completion = query.flatten(0, 1) @ keys.transpose(2, 3)
    if completion_mask is not None:
        to_completion = to_completion.masked_fill(~completion_mask, float("-inf"))
    # One softmax over both parts, in float32.
    scores = torch.cat([unfold(to_prefix), to_completion], -1)
    weights = scores.softmax(-1, dtype=torch.promote_types(values.dtype, torch.float32))
    weights = weights.to(values.dtype)
    of_prefix, of_completion = torch.split(weights, [longest, keys.shape[2]], -1)
    from_prefix = unfold(fold(torch.unflatten(of_prefix, 0, (prompts, n))) @ prefix[1])
    return from_prefix + of_completion @ values
