"""Rotary positions as products of complex numbers.

They take two passes over memory in the forward and two in the backward; transformers takes five or
more. Number i of a head's first half and number i of the second half rotate as a pair. Rotated
heads hold the two numbers of a pair side by side. Queries and keys are reordered alike, so their
products do not change.

Legend: d head width, w width of the part of a head that rotates, N packed rows, m images, L patches
of each, H heads.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from opd_torch.kernels import fused
from opd_torch.kernels.function import Context, Function
from opd_torch.kernels.pointwise import HalfNorm
from opd_torch.layers.modules import Map


def rotary_factors(cosines: Tensor, sines: Tensor) -> Tensor:
    """Complex numbers [..., w / 2], in float32 or float64, from cosines and sines [..., w] whose
    two halves are equal.
    """
    cosines, sines = (
        x[..., : x.shape[-1] // 2].to(torch.promote_types(x.dtype, torch.float32))
        for x in (cosines, sines)
    )
    return torch.complex(cosines.contiguous(), sines.contiguous())


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotates the first w numbers of `heads` [N, H, d] by `angles` [N, 1, w / 2], which
    `rotary_factors` made.
    """
    if not torch.is_grad_enabled():
        return _rotated(heads, angles)
    out: Tensor = _Rotate.apply(heads, angles)
    return out


def normed_rotated(heads: Tensor, norm: Map | None, angles: Tensor) -> Tensor:
    """Normalises `heads` [N, H, d] by `norm`, if it is not None, and rotates them, on a GPU in half
    precision by one kernel.
    """
    if fused.usable(heads) and (norm is None or isinstance(norm, HalfNorm)):
        weight, epsilon = (None, 0.0) if norm is None else (norm.scale, norm.epsilon)
        return fused.normed_rotated(heads, weight, epsilon, angles)
    return rotate(heads if norm is None else norm(heads), angles)


def rotated_heads(packed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts `packed` [m, L, 3, H, d] into queries, keys and values [m, L, H, d], and rotates queries
    and keys by `angles` [L, 1, 1, d / 2].
    """
    if fused.usable(packed):
        return fused.rotated_heads(packed, angles)
    query, key, value = _Heads.apply(packed, angles)
    return query, key, value


def _rotated(heads: Tensor, angles: Tensor) -> Tensor:
    width = 2 * angles.shape[-1]
    rotated = _rotate_pairs(heads[..., :width], angles)
    if width == heads.shape[-1]:
        return rotated
    return torch.cat([rotated, heads[..., width:]], -1)


def _rotate_pairs(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotates heads [..., w]; the result has pairs side by side. Products are rounded before they
    are added, as in transformers.
    """
    first, second = heads.to(angles.real.dtype).chunk(2, -1)
    return torch.view_as_real(torch.complex(first, second).mul_(angles)).flatten(-2).to(heads.dtype)


def _rotate_back(gradient: Tensor, angles: Tensor, out: Tensor) -> None:
    """Writes the gradient of heads [..., w] into `out`, from that of the rotated heads."""
    pairs = torch.unflatten(gradient.to(angles.real.dtype).contiguous(), -1, (-1, 2))
    back = torch.view_as_complex(pairs) * angles.conj()
    for half, part in zip(out.chunk(2, -1), (back.real, back.imag), strict=True):
        half.copy_(part)


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Context, heads: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _rotated(heads, angles)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        width = 2 * angles.shape[-1]
        back = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        _rotate_back(gradient[..., :width], angles, back[..., :width])
        back[..., width:] = gradient[..., width:]
        return back, None


class _HeadsContext(Context, Protocol):
    shape: torch.Size


class _Heads(Function):
    @staticmethod
    def forward(
        ctx: _HeadsContext, packed: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(angles)
        ctx.shape = packed.shape
        query, key = _rotate_pairs(packed[..., :2, :, :], angles).unbind(-3)
        return query, key, packed[..., 2, :, :]

    @staticmethod
    def backward(ctx: _HeadsContext, *gradients: Tensor) -> tuple[Tensor, None]:
        packed = gradients[0].new_empty(ctx.shape)
        _rotate_back(torch.stack(gradients[:2], -3), ctx.saved_tensors[0], packed[..., :2, :, :])
        packed[..., 2, :, :] = gradients[2]
        return packed, None
