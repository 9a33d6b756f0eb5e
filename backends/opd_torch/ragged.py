"""Converts rows of unequal lengths between packed and padded, and maps completions to prompts.

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
    """Rows of unequal `lengths`: packed [total, ...] or padded [rows, longest, ...]. Both
    conversions are differentiable.

    `longest` may exceed all lengths. Padding repeats the first packed entry; results computed from
    padding are never read, and the gradient there is dropped.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device, longest: int = 0) -> None:
        self.lengths = lengths
        self.rows, self.total = len(lengths), int(lengths.sum())
        self.longest = max(longest, int(lengths.max()))
        self._device = device
        self.even = self.rows * self.longest == self.total
        if not self.even:
            valid = np.arange(self.longest) < lengths[:, None]
            packed_entry = np.where(valid.ravel(), np.cumsum(valid.ravel()) - 1, 0)
            self._packed = torch.from_numpy(np.flatnonzero(valid)).to(device)
            self._padded = torch.from_numpy(packed_entry).to(device)

    @cached_property
    def counts(self) -> Tensor:
        """`lengths` on the device."""
        return torch.from_numpy(self.lengths).to(self._device)

    def pad(self, packed: Tensor) -> Tensor:
        """Pads [total, ...] to [rows, longest, ...]."""
        padded = packed if self.even else _Pad.apply(packed, self._padded, self._packed)
        return padded.view(self.rows, self.longest, *packed.shape[1:])

    def fill(self, packed: Tensor, value: float) -> Tensor:
        """Pads [total, ...] to [rows, longest, ...], with `value` in the padding."""
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
    """index_select with an index_select as the backward, since every packed entry has exactly one
    place in the padded rows; autograd's index_add would be far slower.
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
    """index_select with a backward that writes zeros into the padding."""

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
    """Maps R completions to B prompts, from each prompt's number of completions, `counts` [B]."""

    def __init__(self, counts: Sequence[int], device: torch.device) -> None:
        self.each = counts[0] if len(set(counts)) == 1 else None
        self.index = index_tensor(np.repeat(np.arange(len(counts)), counts), device)

    def spread(self, x: Tensor) -> Tensor:
        """Repeats each prompt's entry of `x` [B, ...] for every completion: [R, ...]."""
        if self.each is None:
            return x.index_select(0, self.index)
        # For equal counts the backward of `expand` is a plain sum, which on a CPU is several times
        # faster than a scatter.
        return x[:, None].expand(-1, self.each, *x.shape[1:]).flatten(0, 1)


def index_tensor(values: ArrayLike, device: torch.device) -> Tensor:
    """Converts `values` to an int64 tensor on the device."""
    return torch.from_numpy(np.asarray(values, dtype=np.int64)).to(device)
