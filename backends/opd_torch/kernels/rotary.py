"""Rotary positions with a backward of their own: half of the passes over memory that autograd would take, forward and backward.

Legend: a head of width d is turned in pairs of its first and second half, which `cosines` and `sines` [..., d] hold one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """`heads` [..., d] turned by angles that broadcast to them; where the angles are narrower than a head, its end stays as it is."""
    turned: Tensor = _Rotate.apply(heads, cosines, sines)
    return turned


def rotated_heads(packed: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys of `packed` [..., 3, H, d], turned, and its values, [..., H, d] each; angles [..., 1, 1, d] are float32."""
    query, key, value = _Heads.apply(packed, cosines, sines)
    return query, key, value


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor, out: Tensor) -> None:
    """Writes turned heads to `out`, which has another memory."""
    width = cosines.shape[-1]
    torch.mul(heads[..., :width], cosines, out=out[..., :width])
    first, second = heads[..., :width].chunk(2, -1)
    to_first, to_second = out[..., :width].chunk(2, -1)
    of_first, of_second = sines.chunk(2, -1)
    # Products are rounded before they are added, as they are in transformers; addcmul would not.
    to_first.sub_(second * of_first)
    to_second.add_(first * of_second)
    if width < heads.shape[-1]:
        out[..., width:] = heads[..., width:]


def _back(sines: Tensor) -> Tensor:
    """Sines that turn a gradient back: each half's angle is the other's, the other way around."""
    first, second = sines.chunk(2, -1)
    return -torch.cat([second, first], -1)


class _Rotate(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.dtype = heads.dtype
        out = heads.new_empty(heads.shape, dtype=torch.promote_types(heads.dtype, cosines.dtype))
        _turn(heads, cosines, sines, out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        back = torch.empty_like(gradient)
        _turn(gradient, cosines, _back(sines), back)
        return back.to(ctx.dtype), None, None


class _Heads(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, packed: Tensor, cosines: Tensor, sines: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cosines, sines)
        ctx.shape = packed.shape
        turned = packed[..., :2, :, :].to(cosines.dtype)
        out = torch.empty_like(turned, memory_format=torch.contiguous_format)
        _turn(turned, cosines, sines, out)
        query, key = out.to(packed.dtype).unbind(-3)
        return query, key, packed[..., 2, :, :]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = (x.squeeze(-3) for x in ctx.saved_tensors)
        packed = gradients[0].new_empty(ctx.shape)
        query, key, value = packed.unbind(-3)
        back = _back(sines)
        for place, gradient in ((query, gradients[0]), (key, gradients[1])):
            wide = place if place.dtype == cosines.dtype else torch.empty_like(place, dtype=cosines.dtype)
            _turn(gradient.to(cosines.dtype), cosines, back, wide)
            if wide is not place:
                place.copy_(wide)
        value.copy_(gradients[2])
        return packed, None, None
