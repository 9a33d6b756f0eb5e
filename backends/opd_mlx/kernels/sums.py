"""Sums over a vocabulary. Added one after the other in float32, small numbers would be lost."""

from __future__ import annotations

import mlx.core as mx

BLOCK = 8**3
"""The numbers of a block: about the square root of a vocabulary."""

FEW = 128
"""The most numbers that may be added one after the other."""


def in_blocks(values: mx.array) -> mx.array:
    """Pads the last axis with zeros and cuts it into blocks: [..., V] to [..., blocks, BLOCK]."""
    *rows, width = values.shape
    if width % BLOCK:
        values = mx.pad(values, [*((0, 0) for _ in rows), (0, -width % BLOCK)])
    return values.reshape(*rows, -1, BLOCK)


def block_sums(values: mx.array) -> mx.array:
    """The sums [..., blocks] of the blocks of `in_blocks`, eight numbers at a time.

    Added one after the other, 511 rare ids beside a likely one would be lost.
    """
    return values.reshape(*values.shape[:-1], 8, 8, 8).sum(-3).sum(-2).sum(-1)


def total(values: mx.array) -> mx.array:
    """The sum [..., 1] over the last axis. Added one after the other, float32 would lose 1e-3 of
    it.

    A width that divides into equal parts, as in published vocabularies, needs no padded copy.
    """
    while (width := values.shape[-1]) > FEW:
        part = next((size for size in range(FEW, 15, -1) if width % size == 0), None)
        if part is None:
            values = block_sums(in_blocks(values))
        else:
            values = values.reshape(*values.shape[:-1], -1, part).sum(-1)
    return values.sum(-1, keepdims=True)
