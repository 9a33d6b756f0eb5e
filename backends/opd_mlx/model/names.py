"""Converts names and layouts of tensors between MLX's modules and Hugging Face's files.

Names differ in a prefix. Layouts differ in the kernels of convolutions, whose channels are last in
MLX; all other tensors have at most two axes.
"""

from __future__ import annotations

from typing import TypeAlias

import mlx.core as mx

from opd_mlx.families.family import Family

Parameters: TypeAlias = dict[str, mx.array]
"""Arrays by MLX name."""


def hugging_face(family: Family, name: str) -> str:
    """The name in transformers' module of a parameter in mlx-vlm's module."""
    prefix = next((prefix for prefix in family.names if name.startswith(prefix)), "")
    return family.names.get(prefix, "") + name.removeprefix(prefix)


def channels_last(value: mx.array) -> mx.array:
    """Moves the channels of a convolution's kernel [out, channel, ...] last, as MLX needs them;
    other tensors stay as they are.

    The result is contiguous like a parameter after a step, so that a resumed run computes the same
    numbers to the bit.
    """
    return mx.contiguous(mx.moveaxis(value, 1, -1)) if value.ndim > 2 else value


def channels_second(value: mx.array) -> mx.array:
    """Moves the channels of a convolution's kernel second, as in files; other tensors stay as they
    are.
    """
    return mx.contiguous(mx.moveaxis(value, -1, 1)) if value.ndim > 2 else value
