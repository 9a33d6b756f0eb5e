"""Attention that keeps no scores: they are computed block of rows by block of rows, and in the backward once more.

MLX has no fused attention with a gradient: within `mx.vjp` its own keeps the weights of all heads for the backward, rows times keys. Here
a block of rows meets no key that none of them sees, which is half of a prompt's scores; and blocks are chained, since MLX would compute
many at once. Few scores are kept all the same: to compute them again takes longer than they are worth.

Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, in plain operations and with whole rows.

Legend: B prompts, J key-value heads, G query heads of each, n completions of each prompt (1: the prompt itself), T rows of each, R of
them in a block, K keys, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import TypeAlias, cast

import mlx.core as mx

from opd_mlx.kernels.backward import traced
from opd_mlx.kernels.exponentials import exponential

BLOCK_BYTES = 2**23 if mx.default_device() == mx.cpu else 2**28
"""Scores of a block; about three such arrays are alive at a time."""

BLOCK_ROWS = 128 if mx.default_device() == mx.cpu else 1024
"""Most rows of a block: the fewer they are, the fewer scores are computed of keys that they do not see."""

KEPT_BYTES = 2**24
"""Scores of a call that are kept for its backward."""

Source: TypeAlias = tuple[mx.array, mx.array]
"""Keys and values [B, J, n, K, E], or [B, J, 1, K, E] of which all n read the same."""

Seen: TypeAlias = tuple[slice, Callable[[mx.array], mx.array] | None]
"""What some rows see of a source: a slice of its keys; and from their numbers [R, 1] what is added to scores [B, J, n, G, R, K], -inf where
not, or None. Computed from these it is not there before its block is, and not afterwards: masks of all blocks are as many as scores."""


def attention(query: mx.array, sources: Sequence[Source], seen: Callable[[slice], Sequence[Seen]]) -> mx.array:
    """What scaled queries [B, J, n, G, T, E] find among the keys and values of all `sources`, in one softmax, computed in float32.

    `seen` says of every source what a slice of the T rows sees.
    """
    blocks = _Blocks(query, sources, seen)

    @mx.custom_function
    def run(*given: mx.array) -> list[mx.array]:
        return blocks.forward(*given)

    @run.vjp
    def _(given: Sequence[mx.array], slopes: Sequence[mx.array], found: Sequence[mx.array]) -> list[mx.array]:
        wanted = blocks.backward(slopes[0], found, *given)
        return [one.astype(part.dtype) for one, part in zip(wanted, given, strict=True)]

    return cast("list[mx.array]", run(query, *(part for source in sources for part in source)))[0]


class _Blocks:
    """The T rows in blocks of at most BLOCK_ROWS and BLOCK_BYTES: slices of them, and what these see."""

    def __init__(self, query: mx.array, sources: Sequence[Source], seen: Callable[[slice], Sequence[Seen]]) -> None:
        length, width = query.shape[-2:]
        a_row = 4 * query.size // (length * width)
        most = max(1, min(BLOCK_ROWS, BLOCK_BYTES // (a_row * sum(key.shape[-2] for key, _ in sources))))
        count = -(-length // most)
        ends = [length * number // count for number in range(count + 1)]
        self.rows = [slice(*pair) for pair in pairwise(ends)]
        self.seen = [list(seen(rows)) for rows in self.rows]
        scores = sum(
            (rows.stop - rows.start) * (keys.stop - keys.start) for rows, its in zip(self.rows, self.seen, strict=True) for keys, _ in its
        )
        self.keep = traced() and a_row * scores <= KEPT_BYTES

    def forward(self, query: mx.array, *given: mx.array) -> list[mx.array]:
        """What is found, in the queries' type; and for the backward, block by block, the logarithms of the powers' sums; or, where
        scores are kept, the sums and the powers."""
        keys, values = _sources(given)
        found: list[mx.array] = []
        beside: list[mx.array] = []
        for rows, seen in zip(self.rows, self.seen, strict=True):
            block = query[..., rows, :].astype(mx.float32)
            scores = _scores(mx.depends(block, found[-1:]) if found else block, rows, keys, seen)
            top = scores[0].max(-1, keepdims=True)
            for more in scores[1:]:
                top = mx.maximum(top, more.max(-1, keepdims=True))
            powers = [exponential(part - top) for part in scores]
            parts = [
                (_folded(part, value) @ _and_ones(value[..., at, :])).reshape(*part.shape[:-1], -1)
                for part, value, (at, _) in zip(powers, values, seen, strict=True)
            ]
            mixed, sums = mx.split(_total(parts), [query.shape[-1]], axis=-1)
            found.append((mixed / sums).astype(query.dtype))
            beside += [sums, *powers] if self.keep else [top + mx.log(sums)]
        return [mx.concatenate(found, axis=-2), *beside]

    def backward(self, slope: mx.array, found: Sequence[mx.array], query: mx.array, *given: mx.array) -> list[mx.array]:
        """Slopes to all that was given.

        With weights w and dw = slope v', d scores are w (dw - sum of w dw), where that sum is slope . mixed. Weights are powers over
        their sums, by which slopes are divided instead.
        """
        keys, values = _sources(given)
        mixed, *beside = found
        queries: list[mx.array] = []
        slopes = [mx.zeros_like(part) for pair in zip(keys, values, strict=True) for part in pair]
        for rows, seen in zip(self.rows, self.seen, strict=True):
            # Nothing of a block begins before there is a slope, nor before the block before it has ended.
            block, outer = mx.depends(
                [query[..., rows, :].astype(mx.float32), slope[..., rows, :].astype(mx.float32)], [slope, *queries[-1:], *slopes]
            )
            if self.keep:
                sums, *powers = beside[: 1 + len(keys)]
                beside = beside[1 + len(keys) :]
                outer = outer / sums
            else:
                powers = [exponential(part - beside[0]) for part in _scores(block, rows, keys, seen)]
                beside = beside[1:]
            inner = mx.concatenate([outer, -(outer * mixed[..., rows, :]).sum(-1, keepdims=True)], axis=-1)
            parts = []
            for number, (power, key, value, (at, _)) in enumerate(zip(powers, keys, values, seen, strict=True)):
                weights = _folded(power, key)
                scores = weights * (_folded(inner, key) @ _and_ones(value[..., at, :]).swapaxes(-1, -2))
                parts.append((scores @ key[..., at, :]).reshape(block.shape))
                for place, some in (
                    (2 * number, scores.swapaxes(-1, -2) @ _folded(block, key)),
                    (2 * number + 1, weights.swapaxes(-1, -2) @ _folded(outer, key)),
                ):
                    slopes[place] = slopes[place].at[..., at, :].add(some)
            queries.append(_total(parts))
        return [mx.concatenate(queries, axis=-2), *slopes]


def _sources(given: Sequence[mx.array]) -> tuple[list[mx.array], list[mx.array]]:
    """Keys, and values, of all sources, in float32."""
    parts = [part.astype(mx.float32) for part in given]
    return parts[::2], parts[1::2]


def _scores(block: mx.array, rows: slice, keys: Sequence[mx.array], seen: Sequence[Seen]) -> list[mx.array]:
    """Scores [B, J, n, G, R, K] of a block's queries among what they see of each source's keys."""
    numbers = mx.depends(mx.arange(rows.start, rows.stop)[:, None], block)
    found = []
    for key, (at, mask) in zip(keys, seen, strict=True):
        scores = (_folded(block, key) @ key[..., at, :].swapaxes(-1, -2)).reshape(*block.shape[:-1], -1)
        found.append(scores if mask is None else scores + mask(numbers))
    return found


def _folded(rows: mx.array, like: mx.array) -> mx.array:
    """Rows [B, J, n, G, R, ...] as [B, J, n or 1, rows, ...]: all that read the same keys are one product, and these are read once."""
    return rows.reshape(*like.shape[:3], -1, rows.shape[-1])


def _total(parts: Sequence[mx.array]) -> mx.array:
    first, *others = parts
    for more in others:
        first = first + more
    return first


def _and_ones(value: mx.array) -> mx.array:
    """`value` [..., E] and a column of ones."""
    return mx.concatenate([value, mx.ones((*value.shape[:-1], 1), value.dtype)], axis=-1)
