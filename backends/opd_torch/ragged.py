"""Rows of unequal lengths: packed to padded and back, and which prompt each completion belongs to.

Legend: B prompts, R completions of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from opd_torch.kernels.function import Context, Function


class Ragged:
    """Rows of unequal `lengths`: packed [total, ...] to padded [rows, longest, ...] and back, both
    differentiable.

    `longest` may be more than any length. Padding repeats the first packed entry; what it becomes
    is never read, and its gradient is dropped.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device, longest: int = 0) -> None:
        self.lengths = lengths
        self.rows, self.longest, self.total = (
            len(lengths),
            max(longest, int(lengths.max())),
            int(lengths.sum()),
        )
        self._device = device
        self.even = self.rows * self.longest == self.total
        if not self.even:
            valid = np.arange(self.longest) < lengths[:, None]
            self._packed = torch.from_numpy(np.flatnonzero(valid)).to(device)
            self._padded = torch.from_numpy(
                np.where(valid.ravel(), np.cumsum(valid.ravel()) - 1, 0)
            ).to(device)

    @cached_property
    def counts(self) -> Tensor:
        """`lengths` on the device."""
        return torch.from_numpy(self.lengths).to(self._device)

    def pad(self, packed: Tensor) -> Tensor:
        """Pads [total, ...] to [rows, longest, ...]."""
        padded = packed if self.even else _Pad.apply(packed, self._padded, self._packed)
        return padded.view(self.rows, self.longest, *packed.shape[1:])

    def fill(self, packed: Tensor, value: float) -> Tensor:
        """Pads like `pad`, with `value` in the padding."""
        if self.even:
            return packed.view(self.rows, self.longest, *packed.shape[1:])
        padded = packed.new_full((self.rows * self.longest, *packed.shape[1:]), value)
        return padded.index_copy_(0, self._packed, packed).view(
            self.rows, self.longest, *packed.shape[1:]
        )

    def unpad(self, padded: Tensor) -> Tensor:
        """Packs [rows, longest, ...] to [total, ...]."""
        flat = padded.flatten(0, 1)
        return flat if self.even else _Unpad.apply(flat, self._packed)


class _Pad(Function):
    """index_select whose backward is an index_select too: every packed entry has one place
    (index_add would be far slower).
    """

    @staticmethod
    def forward(ctx: Context, packed: Tensor, padded_index: Tensor, packed_index: Tensor) -> Tensor:
        ctx.save_for_backward(packed_index)
        return packed.index_select(0, padded_index)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(0, ctx.saved_tensors[0]), None, None


class _UnpadContext(Context, Protocol):
    size: int


class _Unpad(Function):
    """index_select whose backward writes zeros where padding stood."""

    @staticmethod
    def forward(ctx: _UnpadContext, padded: Tensor, packed_index: Tensor) -> Tensor:
        ctx.save_for_backward(packed_index)
        ctx.size = len(padded)
        return padded.index_select(0, packed_index)

    @staticmethod
    def backward(ctx: _UnpadContext, gradient: Tensor) -> tuple[Tensor, None]:
        padded = gradient.new_zeros(ctx.size, *gradient.shape[1:])
        padded[ctx.saved_tensors[0]] = gradient
        return padded, None


class Owner:
    """Which prompt each of R completions belongs to, from the `counts` of B prompts."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.each = counts[0] if len(set(counts)) == 1 else None
        self.index = index_tensor(np.repeat(np.arange(len(counts)), counts), device)

    def spread(self, x: Tensor) -> Tensor:
        """Repeats the entry of each prompt [B, ...] for each of its completions, [R, ...]."""
        # With equal counts the backward is a plain sum instead of a scatter, several times faster
        # on the CPU.
        return (
            x.index_select(0, self.index)
            if self.each is None
            else x[:, None].expand(-1, self.each, *x.shape[1:]).flatten(0, 1)
        )


def index_tensor(values: ArrayLike, device: torch.device) -> Tensor:
    """`values` as int64 on the device."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)
