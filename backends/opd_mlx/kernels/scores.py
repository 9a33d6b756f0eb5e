"""Attention that computes scores block by block, and recomputes them in the backward.

MLX has no fused attention with a gradient: within `mx.vjp` MLX's call keeps the weights of all
heads, rows times keys, for the backward. Here a block of rows skips the keys that none of its rows
sees, which are half of a prompt's scores. Blocks depend on one another, because MLX would otherwise
compute many at once. If there are only a few scores, they are kept, since recomputing them would
not be worth the time.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, in plain operations and with whole
rows.

Legend: B prompts, J key-value heads, G query heads of each, n completions of each prompt (1: the
prompt itself), T rows of each, R of them in a block, K keys, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias, cast

import mlx.core as mx

from opd_mlx.device import Device
from opd_mlx.kernels.backward import traced

Source: TypeAlias = tuple[mx.array, mx.array]
"""Keys and values [B, J, n, K, E], or [B, J, 1, K, E] for all n completions."""

Seen: TypeAlias = tuple[slice, Callable[[mx.array], mx.array] | None]
"""What some rows see of a source: a slice of the source's keys, and a mask or None.

The mask is a function of the rows' numbers [R, 1] that returns what is added to the scores
[B, J, n, G, R, K]: -inf where a row does not see a key. It is a function so that a mask is computed
and freed with the block, because the masks of all blocks are as large as the scores.
"""


def attention(
    query: mx.array,
    sources: Sequence[Source],
    seen: Callable[[slice], Sequence[Seen]],
    device: Device,
) -> mx.array:
    """Attention of scaled queries [B, J, n, G, T, E] over all `sources`, in one float32 softmax.

    `seen` gives for every source what a slice of the T rows sees.
    """
    blocks = _Blocks(query, sources, seen, device)

    @mx.custom_function
    def run(*inputs: mx.array) -> list[mx.array]:
        return blocks.forward(*inputs)

    @run.vjp
    def _(
        inputs: Sequence[mx.array], gradients: Sequence[mx.array], outputs: Sequence[mx.array]
    ) -> list[mx.array]:
        to_inputs = blocks.backward(gradients[0], outputs, *inputs)
        return [x.astype(part.dtype) for x, part in zip(to_inputs, inputs, strict=True)]

    flat = [part for source in sources for part in source]
    return cast("list[mx.array]", run(query, *flat))[0]


class _Blocks:
    """Cuts the T rows into blocks within the device's bounds.

    `rows` are the slices, `seen` is what each slice sees of every source, and `keep` says whether
    the scores are kept for the backward.
    """

    def __init__(
        self,
        query: mx.array,
        sources: Sequence[Source],
        seen: Callable[[slice], Sequence[Seen]],
        device: Device,
    ) -> None:
        length, width = query.shape[-2:]
        key_bytes = 4 * query.size // (length * width)  # of the scores of one row and key
        keys = sum(key.shape[-2] for key, _ in sources)
        fitting = device.score_block_bytes // (key_bytes * keys)
        count = -(-length // max(1, min(device.score_block_rows, fitting)))
        ends = [length * number // count for number in range(count + 1)]
        self.rows = [slice(*pair) for pair in pairwise(ends)]
        self.seen = [list(seen(rows)) for rows in self.rows]
        scores = sum(
            (rows.stop - rows.start) * (keys.stop - keys.start)
            for rows, sources_seen in zip(self.rows, self.seen, strict=True)
            for keys, _ in sources_seen
        )
        self.keep = traced() and key_bytes * scores <= device.kept_score_bytes

    def forward(self, query: mx.array, *flat: mx.array) -> list[mx.array]:
        """Returns the result in the queries' type, then arrays for the backward, block by block.

        These are the logarithm of each row's sum of exponentials, or if scores are kept the sums
        and the exponentials.
        """
        keys, values = _sources(flat)
        mixed_blocks: list[mx.array] = []
        for_backward: list[mx.array] = []
        for rows, seen in zip(self.rows, self.seen, strict=True):
            block = query[..., rows, :].astype(mx.float32)
            if mixed_blocks:
                block = mx.depends(block, mixed_blocks[-1:])
            scores = _scores(block, rows, keys, seen)
            top = scores[0].max(-1, keepdims=True)
            for more in scores[1:]:
                top = mx.maximum(top, more.max(-1, keepdims=True))
            powers = [mx.exp(part - top) for part in scores]
            parts = [
                (_folded(part, value) @ _and_ones(value[..., at, :])).reshape(*part.shape[:-1], -1)
                for part, value, (at, _) in zip(powers, values, seen, strict=True)
            ]
            mixed, sums = mx.split(_total(parts), [query.shape[-1]], axis=-1)
            mixed_blocks.append((mixed / sums).astype(query.dtype))
            for_backward += [sums, *powers] if self.keep else [top + mx.log(sums)]
        return [mx.concatenate(mixed_blocks, axis=-2), *for_backward]

    def backward(
        self, gradient: mx.array, outputs: Sequence[mx.array], query: mx.array, *flat: mx.array
    ) -> list[mx.array]:
        """The gradients of the queries and of all keys and values, from the `gradient` of the
        result.

        With weights w and dw = gradient v', the gradient of the scores is w (dw - sum of w dw), and
        the sum of w dw is gradient . mixed. If scores are kept, w is an exponential over the row's
        sum; the gradient is divided by the sum instead.
        """
        keys, values = _sources(flat)
        mixed, *for_backward = outputs
        queries: list[mx.array] = []
        gradients = [
            mx.zeros_like(part) for pair in zip(keys, values, strict=True) for part in pair
        ]
        for rows, seen in zip(self.rows, self.seen, strict=True):
            # A block begins when the gradient is computed and the block before it has ended.
            block, outer = mx.depends(
                [
                    query[..., rows, :].astype(mx.float32),
                    gradient[..., rows, :].astype(mx.float32),
                ],
                [gradient, *queries[-1:], *gradients],
            )
            if self.keep:
                sums, *powers = for_backward[: 1 + len(keys)]
                for_backward = for_backward[1 + len(keys) :]
                outer = outer / sums
            else:
                scores = _scores(block, rows, keys, seen)
                powers = [mx.exp(part - for_backward[0]) for part in scores]
                for_backward = for_backward[1:]
            dots = -(outer * mixed[..., rows, :]).sum(-1, keepdims=True)
            inner = mx.concatenate([outer, dots], axis=-1)
            parts = []
            for number, (power, key, value, (at, _)) in enumerate(
                zip(powers, keys, values, seen, strict=True)
            ):
                weights = _folded(power, key)
                to_scores = weights * (
                    _folded(inner, key) @ _and_ones(value[..., at, :]).swapaxes(-1, -2)
                )
                parts.append((to_scores @ key[..., at, :]).reshape(block.shape))
                to_keys = to_scores.swapaxes(-1, -2) @ _folded(block, key)
                to_values = weights.swapaxes(-1, -2) @ _folded(outer, key)
                for place, part in ((2 * number, to_keys), (2 * number + 1, to_values)):
                    gradients[place] = gradients[place].at[..., at, :].add(part)
            queries.append(_total(parts))
        return [mx.concatenate(queries, axis=-2), *gradients]


def _sources(flat: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """The keys of all sources and the values of all sources, in float32."""
    parts = [part.astype(mx.float32) for part in flat]
    return parts[::2], parts[1::2]


def _scores(
    block: mx.array, rows: slice, keys: Sequence[mx.array], seen: Sequence[Seen]
) -> list[mx.array]:
    """The scores [B, J, n, G, R, K] of a block's queries and the keys that they see, by source."""
    numbers = mx.depends(mx.arange(rows.start, rows.stop)[:, None], block)
    by_source = []
    for key, (at, mask) in zip(keys, seen, strict=True):
        products = _folded(block, key) @ key[..., at, :].swapaxes(-1, -2)
        scores = products.reshape(*block.shape[:-1], -1)
        by_source.append(scores if mask is None else scores + mask(numbers))
    return by_source


def _folded(rows: mx.array, like: mx.array) -> mx.array:
    """Reshapes rows [B, J, n, G, R, ...] to [B, J, n or 1, rows, ...], with the leading axes of the
    keys `like`.

    All rows that read the same keys then take one product, which reads these keys once.
    """
    return rows.reshape(*like.shape[:3], -1, rows.shape[-1])


def _total(parts: Sequence[mx.array]) -> mx.array:
    first, *others = parts
    for more in others:
        first = first + more
    return first


def _and_ones(value: mx.array) -> mx.array:
    """Appends a column of ones to `value` [..., E]."""
    return mx.concatenate([value, mx.ones((*value.shape[:-1], 1), value.dtype)], axis=-1)
