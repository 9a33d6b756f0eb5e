"""Names and layouts of tensors: MLX's in the modules, Hugging Face's in files.

They differ in a prefix, and in the kernels of convolutions, whose channels MLX keeps last. No
other tensor has more than two axes.
"""

from __future__ import annotations

from typing import TypeAlias

import mlx.core as mx

from opd_mlx.families.family import Family

Parameters: TypeAlias = dict[str, mx.array]
"""Arrays by MLX name."""


def hugging_face(family: Family, name: str) -> str:
    """The name in transformers' module of a parameter of mlx-vlm's."""
    prefix = next((prefix for prefix in family.names if name.startswith(prefix)), "")
    return family.names.get(prefix, "") + name.removeprefix(prefix)


def channels_last(value: mx.array) -> mx.array:
    """The kernel of a convolution [out, channel, ...] as MLX convolves; other tensors as they are.

    Contiguous, as a step leaves it: so a restored run computes what the run would have, to the bit.
    """
    return mx.contiguous(mx.moveaxis(value, 1, -1)) if value.ndim > 2 else value


def channels_second(value: mx.array) -> mx.array:
    """The kernel of a convolution [out, channel, ...] as files have it; others as they are."""
    return mx.contiguous(mx.moveaxis(value, -1, 1)) if value.ndim > 2 else value
