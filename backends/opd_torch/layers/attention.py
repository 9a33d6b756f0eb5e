"""Two-stream attention: a prompt's tokens run once, and its n completions share their keys and values.

`prefix_layer` runs prompt tokens and gives their keys and values; `completion_layer` runs completion tokens over their prompt's keys
and their own (`joined`). Training runs the one and then the other; sampling keeps what the first gave and runs `decode_layer` a
token at a time. Norms, projections and feed-forward are transformers' modules, on packed rows, in the order that the family gives;
only attention sees padding.

Legend: N packed rows, M of completions, B prompts, P longest prefix, R completions of all prompts, n of each where they are as many, T
longest completion, H query heads, G key-value heads, Q = H / G queries that share a key, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opd_torch.batch import Batch, Prefixes, Step
from opd_torch.kernels.joined import joinable, joined

if TYPE_CHECKING:
    from opd_torch.families.family import Family

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Keys, with positions rotated in (`kernels.rotary`), and values: [B, G, P, d] of prefixes, [R, G, T, d] of completions."""

Angles: TypeAlias = Tensor
"""Rotary positions as complex numbers [N, 1, d / 2], or fewer where only a part of a head is turned (`kernels.rotary`)."""

ROOM = 64
"""Tokens of a completion that fresh buffers hold; they double when they are full."""


def room(count: int) -> int:
    """Tokens that the buffers of a completion of `count` tokens hold."""
    return int(ROOM << max(0, -(-count // ROOM) - 1).bit_length())


@dataclass
class Own:
    """A completion layer's own keys and values in decoding: buffers [R, G, room, d], with zeros where no token stands yet."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def append(self, key: Tensor, value: Tensor, step: Step) -> KeysValues:
        """Adds one token's keys and values [R, G, d]; returns the first `step.count` of all."""
        if self.keys is None or self.values is None:
            self.keys, self.values = (x.new_zeros(*x.shape[:2], room(step.count), x.shape[2]) for x in (key, value))
        elif step.count > self.keys.shape[2]:
            more = (0, 0, 0, room(step.count) - self.keys.shape[2])
            self.keys, self.values = (torch.nn.functional.pad(x, more) for x in (self.keys, self.values))
        self.keys.index_copy_(2, step.number, key[:, :, None])
        self.values.index_copy_(2, step.number, value[:, :, None])
        return self.keys[:, :, : step.count], self.values[:, :, : step.count]

    def select(self, rows: Tensor) -> None:
        """Leaves only some completions."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def prefix_layer(family: Family, layer: Any, hidden: Tensor, angles: Angles, prefixes: Prefixes, last: bool) -> tuple[Tensor, KeysValues]:
    """Prompt rows [N, D] through one layer: the rows after it, and its keys and values.

    After the last layer nobody reads a prompt's rows, so they are not computed there.
    """
    ragged = prefixes.ragged
    normed = layer.input_layernorm(hidden)
    key, value = (ragged.pad(x).transpose(1, 2) for x in family.keys_values(layer, normed, angles))
    if last:
        return hidden, (key, value)
    query, gate = family.queries(layer, normed, angles)
    query = ragged.pad(query.to(value.dtype)).transpose(1, 2)
    mask = prefixes.mask(family.reach(layer))
    mixed = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=mask is None,
        scale=layer.self_attn.scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return family.finish(layer, hidden, ragged.unpad(mixed.transpose(1, 2)), gate), (key, value)


def completion_layer(family: Family, layer: Any, hidden: Tensor, angles: Angles, prefix: KeysValues, batch: Batch) -> Tensor:
    """Completion rows [M, D] through one layer, over `prefix` and their own keys."""
    normed = layer.input_layernorm(hidden)
    key, value = family.keys_values(layer, normed, angles)
    query, gate = family.queries(layer, normed, angles)
    query, scale, reach = query.to(value.dtype), layer.self_attn.scaling, family.reach(layer)
    if reach.window is None and joinable(query, key):
        mixed = joined(query, key, value, *prefix, batch, scale)
    else:
        mixed = _masked(query, key, value, prefix, batch, batch.mask(reach), scale)
    return family.finish(layer, hidden, mixed, gate)


def _masked(query: Tensor, key: Tensor, value: Tensor, prefix: KeysValues, batch: Batch, mask: Tensor, scale: float) -> Tensor:
    """What completion rows [M, H, d] find under `mask`; each completion has a copy of its prompt's keys before its own."""
    spread = (batch.owner.spread(x) for x in prefix)
    key, value = (torch.cat([before, batch.ragged.pad(x).transpose(1, 2)], 2) for before, x in zip(spread, (key, value), strict=True))
    query = batch.ragged.pad(query)
    rows, length, heads, width = query.shape
    groups = key.shape[1]
    # Queries that share a key stand one after the other in one row, so that no key is repeated for them.
    query = query.view(rows, length, groups, -1, width).permute(0, 2, 3, 1, 4).reshape(rows, groups, -1, width)
    mixed = scaled_dot_product_attention(query, key, value, attn_mask=mask.repeat(1, 1, heads // groups, 1), scale=scale)
    return batch.ragged.unpad(mixed.view(rows, groups, -1, length, width).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, width))


def decode_layer(
    family: Family, layer: Any, hidden: Tensor, angles: Angles, prefix: KeysValues, prefixes: Prefixes, own: Own, step: Step
) -> Tensor:
    """The next row of every completion [R, D] through one layer, n to a prompt; a prompt's keys are read once for all n."""
    of_prompt, of_itself = step.masks(prefixes, family.reach(layer))
    normed = layer.input_layernorm(hidden)
    key, value = own.append(*family.keys_values(layer, normed, angles), step)
    query, gate = family.queries(layer, normed, angles)
    query = query.to(value.dtype) * layer.self_attn.scaling
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
    if of_prompt is not None:
        to_prefix = to_prefix.masked_fill(~of_prompt, float("-inf"))
    to_own = query.flatten(0, 1) @ key.transpose(2, 3)
    if of_itself is not None:
        to_own = to_own.masked_fill(~of_itself, float("-inf"))
    # One softmax over both parts, in float32.
    weights = torch.cat([unfold(to_prefix), to_own], -1).softmax(-1, dtype=torch.promote_types(value.dtype, torch.float32))
    of_prefix, of_own = weights.to(value.dtype).split([longest, key.shape[2]], -1)
    mixed = unfold(fold(of_prefix.unflatten(0, (prompts, n))) @ prefix[1]) + of_own @ value
    return family.finish(layer, hidden, mixed, gate)
