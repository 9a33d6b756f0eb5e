"""Sums over a whole vocabulary, which float32 loses if it adds one number after the other."""

from __future__ import annotations

import mlx.core as mx

BLOCK = 8**3
"""Numbers that are summed together: about the root of a vocabulary."""

FEW = 128
"""Numbers that may be added one after the other."""


def in_blocks(values: mx.array) -> mx.array:
    """The last axis, filled up with zeros, in blocks: [..., V] becomes [..., blocks, BLOCK]."""
    *rows, width = values.shape
    if width % BLOCK:
        values = mx.pad(values, [*((0, 0) for _ in rows), (0, -width % BLOCK)])
    return values.reshape(*rows, -1, BLOCK)


def block_sums(values: mx.array) -> mx.array:
    """Sums [..., blocks] of the blocks of `in_blocks`, by eights.

    Added one after the other, 511 rare ids beside a likely one would be lost.
    """
    return values.reshape(*values.shape[:-1], 8, 8, 8).sum(-3).sum(-2).sum(-1)


def total(values: mx.array) -> mx.array:
    """The sum [..., 1] over the last axis; added one after the other, float32 loses 1e-3 of it.

    Parts of equal width need no copy that is filled up; the widths of published vocabularies have
    such parts.
    """
    while (width := values.shape[-1]) > FEW:
        part = next((size for size in range(FEW, 15, -1) if width % size == 0), None)
        if part is None:
            values = block_sums(in_blocks(values))
        else:
            values = values.reshape(*values.shape[:-1], -1, part).sum(-1)
    return values.sum(-1, keepdims=True)
