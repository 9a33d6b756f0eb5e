"""Rotary positions as products of complex numbers: two passes over memory forward and two backward, where transformers takes five and more.

A head is turned in pairs of its first and second half. Turned heads have the two numbers of a pair side by side, which no product of a
query and a key sees.

Legend: d head width, w the turned part of it, N packed rows; m images, L patches of each, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opd_torch.kernels import fused
from opd_torch.kernels.pointwise import HalfNorm


def turns(cosines: Tensor, sines: Tensor) -> Tensor:
    """Complex numbers [..., w / 2] of angles [..., w] whose halves are alike, in float32 or above."""
    cosines, sines = (x[..., : x.shape[-1] // 2].to(torch.promote_types(x.dtype, torch.float32)) for x in (cosines, sines))
    return torch.complex(cosines.contiguous(), sines.contiguous())


def rotate(heads: Tensor, angles: Tensor) -> Tensor:
    """`heads` [N, H, d] by `angles` [N, 1, w / 2] of `turns`; what is behind w stays as it is."""
    turned: Tensor = _Rotate.apply(heads, angles) if torch.is_grad_enabled() else _rotated(heads, angles)
    return turned


def normed_turned(heads: Tensor, norm: Any, angles: Tensor) -> Tensor:
    """`rotate` of `heads` that `norm`, if it is not None, has normalised; at once where there is a kernel."""
    if fused.usable(heads) and (norm is None or isinstance(norm, HalfNorm)):
        return fused.normed_turned(heads, None if norm is None else norm.scale, 0.0 if norm is None else norm.epsilon, angles)
    return rotate(heads if norm is None else norm(heads), angles)


def rotated_heads(packed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of `packed` [m, L, 3, H, d], turned by `angles` [L, 1, 1, d / 2], and its values, [m, L, H, d] each."""
    query, key, value = fused.turned_heads(packed, angles) if fused.usable(packed) else _Heads.apply(packed, angles)
    return query, key, value


def _rotated(heads: Tensor, angles: Tensor) -> Tensor:
    width = 2 * angles.shape[-1]
    turned = _turn(heads[..., :width], angles)
    return turned if width == heads.shape[-1] else torch.cat([turned, heads[..., width:]], -1)


def _turn(heads: Tensor, angles: Tensor) -> Tensor:
    """Turned heads [..., w], with pairs side by side; products are rounded before they are added, as in transformers."""
    first, second = heads.to(angles.real.dtype).chunk(2, -1)
    return torch.view_as_real(torch.complex(first, second).mul_(angles)).flatten(-2).to(heads.dtype)


def _turn_back(gradient: Tensor, angles: Tensor, out: Tensor) -> None:
    """Writes the gradient to heads [..., w] into `out`, from that to turned ones."""
    pairs = gradient.to(angles.real.dtype).contiguous().unflatten(-1, (-1, 2))
    back = torch.view_as_complex(pairs) * angles.conj()
    for half, part in zip(out.chunk(2, -1), (back.real, back.imag), strict=True):
        half.copy_(part)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, heads: Tensor, angles: Tensor) -> Tensor:
        ctx.save_for_backward(angles)
        return _rotated(heads, angles)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        width = 2 * angles.shape[-1]
        back = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        _turn_back(gradient[..., :width], angles, back[..., :width])
        back[..., width:] = gradient[..., width:]
        return back, None


class _Heads(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, packed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(angles)
        ctx.shape = packed.shape
        query, key = _turn(packed[..., :2, :, :], angles).unbind(-3)
        return query, key, packed[..., 2, :, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        packed = gradients[0].new_empty(ctx.shape)
        _turn_back(torch.stack(gradients[:2], -3), ctx.saved_tensors[0], packed[..., :2, :, :])
        packed[..., 2, :, :] = gradients[2]
        return packed, None
