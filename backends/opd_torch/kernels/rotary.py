"""Rotary positions as products of complex numbers: two passes over memory forward and two backward,
where transformers takes five and more.

A number of a head's first half and one of its second half rotate as a pair. Rotated heads have the
two numbers of a pair side by side, which no product of a query and a key sees.

Legend: d head width, w the part of it that rotates, N packed rows; m images, L patches of each, H
heads.
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
    """Complex numbers [..., w / 2] from cosines and sines [..., w] whose halves are alike, in
    float32 or above.
    """
    cosines, sines = (
        x[..., : x.shape[-1] // 2].to(torch.promote_types(x.dtype, torch.float32))
        for x in (cosines, sines)
    )
    return torch.complex(cosines.contiguous(), sines.contiguous())


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """Rotates `heads` [N, H, d] by `angles` [N, 1, w / 2] from `rotary_factors`; numbers behind w
    stay as they are.
    """
    if not torch.is_grad_enabled():
        return _rotated(heads, angles)
    out: Tensor = _Rotate.apply(heads, angles)
    return out


def normed_rotated(heads: Tensor, norm: Map | None, angles: Tensor) -> Tensor:
    """Normalises `heads` [N, H, d] by `norm`, if it is not None, and rotates them; in one kernel
    where there is one.
    """
    if fused.usable(heads) and (norm is None or isinstance(norm, HalfNorm)):
        weight, epsilon = (None, 0.0) if norm is None else (norm.scale, norm.epsilon)
        return fused.normed_rotated(heads, weight, epsilon, angles)
    return rotate(heads if norm is None else norm(heads), angles)


def rotated_heads(packed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of `packed` [m, L, 3, H, d], rotated by `angles` [L, 1, 1, d / 2], and its
    values, [m, L, H, d] each.
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
    """Rotated heads [..., w], with pairs side by side; products are rounded before they are added,
    as in transformers.
    """
    first, second = heads.to(angles.real.dtype).chunk(2, -1)
    return torch.view_as_real(torch.complex(first, second).mul_(angles)).flatten(-2).to(heads.dtype)


def _rotate_back(gradient: Tensor, angles: Tensor, out: Tensor) -> None:
    """Writes the gradient to heads [..., w] into `out`, from the gradient to rotated heads."""
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
