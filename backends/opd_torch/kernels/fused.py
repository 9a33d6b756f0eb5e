"""Triton kernels for half precision on a GPU, one for each chain of elementwise operations.

A kernel reads inputs once and writes outputs once. Without these kernels the chains took 210 of the
670 ms of a student's forward and backward on an H200 (Qwen3-VL-4B, 4,096 tokens), all in passes
over memory. The kernels compute in float32 and round once. Each program writes a partial sum of a
weight's gradient, and torch adds them in a fixed order, so the result does not depend on the order
in which programs run.

Legend: N rows, D width of a row, H heads of width d, of which w numbers rotate, F width of a
feed-forward, m images, L patches of each.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from opd_torch.kernels.function import Context, Function

# torch for CUDA includes Triton. Without a GPU, Triton's interpreter runs the kernels for tests.
HERE = find_spec("triton") is not None and (
    torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
)
if HERE:
    import triton
    import triton.language as tl

PROGRAMS = 528
"""The programs of a backward with a weight's gradient: four for each multiprocessor of an H100."""

NUMBERS = 2048
"""The numbers in a program's tile of heads or of a gate."""


def usable(x: Tensor) -> bool:
    """Whether these kernels take `x`: on a GPU, in bfloat16 or under autocast to bfloat16."""
    if not (HERE and x.is_cuda):
        return False
    if x.dtype == torch.bfloat16:
        return True
    autocast = torch.is_autocast_enabled("cuda")
    return bool(autocast and torch.get_autocast_dtype("cuda") == torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
    """x / sqrt(mean(x^2) + epsilon) * weight for rows [..., D], in `dtype`; `weight` is float32."""
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _Norm.apply(rows, weight, epsilon, dtype)
    return out.view(x.shape)


def normed_rotated(heads: Tensor, weight: Tensor | None, epsilon: float, angles: Tensor) -> Tensor:
    """Normalises `heads` [N, H, d] by `weight` [d], if it is not None, and rotates them, as
    `rms_norm` and `kernels.rotary.rotate` do; returns bfloat16.

    `angles` are [N, 1, w / 2].
    """
    out: Tensor = _Rotate.apply(heads[None], weight, epsilon, angles)
    return out[0]


def rotated_heads(packed: Tensor, angles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cuts `packed` [m, L, 3, H, d] into queries, keys and values [m, L, H, d], and rotates queries
    and keys by `angles` [L, 1, 1, d / 2].
    """
    query, key, value = _Heads.apply(packed, angles)
    return query, key, value


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [N, F] each."""
    out: Tensor = _Gated.apply(gate, up)
    return out


class _Norm(Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
    ) -> Tensor:
        x = x if x.stride(-1) == 1 else x.contiguous()
        out, scales = x.new_empty(x.shape, dtype=dtype), x.new_empty(len(x), dtype=torch.float32)
        if len(x):
            _norm[(len(x),)](x, weight, out, scales, x.stride(0), x.shape[1], epsilon, **_width(x))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        gradient = gradient.contiguous()
        x_gradient = torch.empty_like(x, memory_format=torch.contiguous_format)
        programs = min(len(x), PROGRAMS)
        parts = weight.new_empty(programs, len(weight))
        if programs:
            _norm_back[(programs,)](
                gradient,
                x,
                weight,
                scales,
                x_gradient,
                parts,
                len(x),
                x.stride(0),
                x.shape[1],
                **_width(x),
            )
        return x_gradient, parts.sum(0) if ctx.needs_input_grad[1] else None, None, None


class _Rotate(Function):
    """Norm and rotation of heads [1, N, H, d]."""

    @staticmethod
    def forward(
        ctx: Context, heads: Tensor, weight: Tensor | None, epsilon: float, angles: Tensor
    ) -> Tensor:
        heads, angles = _aligned(heads), torch.view_as_real(angles).flatten(1)
        out = heads.new_empty(heads.shape, dtype=torch.bfloat16)
        scales = heads.new_empty(heads.shape[:3] if weight is not None else 0, dtype=torch.float32)
        _rotate_all(heads, weight, epsilon, angles, out, scales)
        ctx.save_for_backward(heads, weight, angles, scales)
        return out

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        heads, weight, angles, scales = ctx.saved_tensors
        heads_gradient = torch.empty_like(heads, memory_format=torch.contiguous_format)
        parts = _rotate_all_back(_aligned(gradient), heads, weight, angles, scales, heads_gradient)
        return (
            heads_gradient,
            parts.sum(0) if weight is not None and ctx.needs_input_grad[1] else None,
            None,
            None,
        )


class _HeadsContext(Context, Protocol):
    shape: torch.Size


class _Heads(Function):
    @staticmethod
    def forward(
        ctx: _HeadsContext, packed: Tensor, angles: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        angles = torch.view_as_real(angles).flatten(1)
        both = packed[:, :, :2].flatten(2, 3)  # a view: queries and keys are adjacent
        out = torch.empty_like(both, memory_format=torch.contiguous_format)
        _rotate_all(both, None, 0.0, angles, out, out)
        ctx.save_for_backward(angles)
        ctx.shape = packed.shape
        query, key = out.chunk(2, 2)
        return query, key, packed[:, :, 2]

    @staticmethod
    def backward(ctx: _HeadsContext, *gradients: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        packed = gradients[0].new_empty(ctx.shape)
        for number, gradient in enumerate(gradients[:2]):
            _rotate_all_back(
                _aligned(gradient), packed[:, :, number], None, angles, packed, packed[:, :, number]
            )
        packed[:, :, 2] = gradients[2]
        return packed, None


class _Gated(Function):
    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        out = torch.empty_like(gate)
        if out.numel():
            _gated[(triton.cdiv(out.numel(), NUMBERS),)](gate, up, out, out.numel(), NUMBERS)
        ctx.save_for_backward(gate, up)
        return out

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradient = gradient.contiguous()
        gate_gradient, up_gradient = torch.empty_like(gate), torch.empty_like(up)
        if gate.numel():
            _gated_back[(triton.cdiv(gate.numel(), NUMBERS),)](
                gradient, gate, up, gate_gradient, up_gradient, gate.numel(), NUMBERS
            )
        return gate_gradient, up_gradient


def _width(x: Tensor) -> dict[str, int]:
    """A kernel's block of one row, and so many warps that a thread has about ten numbers."""
    width = triton.next_power_of_2(x.shape[1])
    return {"WIDTH": width, "num_warps": min(16, max(1, width // 512))}


def _aligned(x: Tensor) -> Tensor:
    """`x` with the numbers of a head side by side in memory, as the kernels read them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _sizes(heads: Tensor, angles: Tensor) -> dict[str, int]:
    """The sizes with which kernels cut heads [m, L, H, d] into tiles.

    `half` is w / 2, `rest` d - w, `HALF` and `REST` the next powers of 2, `ROWS` the heads of a
    tile.
    """
    half, rest = angles.shape[1] // 2, heads.shape[3] - angles.shape[1]
    blocks = {
        "HALF": triton.next_power_of_2(half),
        "REST": triton.next_power_of_2(rest) if rest else 0,
    }
    tile = max(1, NUMBERS // triton.next_power_of_2(heads.shape[3]))
    rows = heads.shape[0] * heads.shape[1] * heads.shape[2]
    return {
        "rows": rows,
        "length": heads.shape[1],
        "count": heads.shape[2],
        "half": half,
        "rest": rest,
        **blocks,
        "ROWS": tile,
    }


def _rotate_all(
    heads: Tensor,
    weight: Tensor | None,
    epsilon: float,
    angles: Tensor,
    out: Tensor,
    scales: Tensor,
) -> None:
    """Normalises heads [m, L, H, d] if `weight` is not None, and writes the rotated heads into the
    contiguous `out`, and the norms' factors into `scales`.
    """
    sizes, norm = _sizes(heads, angles), weight is not None
    if sizes["rows"]:
        grid = (triton.cdiv(sizes["rows"], sizes["ROWS"]),)
        _rotate[grid](
            heads,
            weight if norm else angles,
            angles,
            out,
            scales,
            *heads.stride()[:3],
            epsilon,
            **sizes,
            NORM=norm,
        )


def _rotate_all_back(
    gradient: Tensor,
    heads: Tensor,
    weight: Tensor | None,
    angles: Tensor,
    scales: Tensor,
    out: Tensor,
) -> Tensor:
    """Writes the gradient of heads [m, L, H, d] into `out`; returns partial sums [programs, d] of
    the weight's gradient.
    """
    sizes, norm = _sizes(heads, angles), weight is not None
    programs = min(triton.cdiv(sizes["rows"], sizes["ROWS"]), PROGRAMS)
    parts = angles.new_empty(programs if norm else 0, heads.shape[3])
    if programs:
        strides = *gradient.stride()[:3], *heads.stride()[:3], *out.stride()[:3]
        _rotate_back[(programs,)](
            gradient,
            heads,
            weight if norm else angles,
            angles,
            scales,
            out,
            parts,
            *strides,
            **sizes,
            NORM=norm,
        )
    return parts


if HERE:

    @triton.jit
    def _norm(x, weight, out, scales, stride, width, epsilon, WIDTH: tl.constexpr):  # noqa: N803
        """Each program computes one row [D]."""
        row, column = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)
        real = column < width
        values = tl.load(x + row * stride + column, mask=real, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(values * values) / width + epsilon)
        normed = values * scale * tl.load(weight + column, mask=real, other=0.0)
        tl.store(out + row * width + column, normed.to(out.dtype.element_ty), mask=real)
        tl.store(scales + row, scale)

    @triton.jit
    def _norm_back(
        gradient,
        x,
        weight,
        scales,
        x_gradient,
        parts,
        rows,
        stride,
        width,
        WIDTH: tl.constexpr,  # noqa: N803
    ):
        """Each program computes every `num_programs`-th row, and a partial sum of the weight's
        gradient.
        """
        column = tl.arange(0, WIDTH)
        real = column < width
        factor, part = tl.load(weight + column, mask=real, other=0.0), tl.zeros([WIDTH], tl.float32)
        for number in range(tl.program_id(0), rows, tl.num_programs(0)):
            row = tl.cast(number, tl.int64)
            scale = tl.load(scales + row)
            normed = tl.load(x + row * stride + column, mask=real, other=0.0).to(tl.float32) * scale
            incoming = tl.load(gradient + row * width + column, mask=real, other=0.0).to(tl.float32)
            part += incoming * normed
            incoming *= factor
            outgoing = (incoming - normed * (tl.sum(incoming * normed) / width)) * scale
            tl.store(
                x_gradient + row * width + column,
                outgoing.to(x_gradient.dtype.element_ty),
                mask=real,
            )
        tl.store(parts + tl.program_id(0) * width + column, part, mask=real)

    @triton.jit
    def _rotate(
        heads, weight, angles, out, scales, outer, middle, inner, epsilon,
        rows, length, count, half, rest,
        HALF: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Each program computes `ROWS` heads in three parts: the first and the second half of the
        rotating numbers, and the rest.
        """
        row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        token, column = row // count, tl.arange(0, HALF)[None, :]
        place = heads + token // length * outer + token % length * middle + row % count * inner
        real = (row < rows) & (column < half)
        first = tl.load(place + column, mask=real, other=0.0).to(tl.float32)
        second = tl.load(place + half + column, mask=real, other=0.0).to(tl.float32)
        if REST:
            behind = tl.arange(0, REST)[None, :]
            there = (row < rows) & (behind < rest)
            last = tl.load(place + 2 * half + behind, mask=there, other=0.0).to(tl.float32)
        if NORM:
            square = tl.sum(first * first + second * second, 1, keep_dims=True)
            if REST:
                square += tl.sum(last * last, 1, keep_dims=True)
            scale = tl.rsqrt(square / (2 * half + rest) + epsilon)
            tl.store(scales + row, scale, mask=row < rows)
            first *= scale * tl.load(weight + column, mask=column < half, other=0.0)
            second *= scale * tl.load(weight + half + column, mask=column < half, other=0.0)
            if REST:
                last *= scale * tl.load(weight + 2 * half + behind, mask=behind < rest, other=0.0)
        angle = angles + token % length * 2 * half + 2 * column
        real_part, imaginary = (
            tl.load(angle, mask=real, other=0.0),
            tl.load(angle + 1, mask=real, other=0.0),
        )
        pairs = tl.interleave(
            first * real_part - second * imaginary, first * imaginary + second * real_part
        )
        target, wide = out + row * (2 * half + rest), tl.arange(0, 2 * HALF)[None, :]
        tl.store(
            target + wide, pairs.to(out.dtype.element_ty), mask=(row < rows) & (wide < 2 * half)
        )
        if REST:
            tl.store(target + 2 * half + behind, last.to(out.dtype.element_ty), mask=there)

    @triton.jit
    def _rotate_back(
        gradient, heads, weight, angles, scales, out, parts, g_outer, g_middle, g_inner,
        outer, middle, inner, o_outer, o_middle, o_inner, rows, length, count, half, rest,
        HALF: tl.constexpr, REST: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr,  # noqa: N803
    ):  # fmt: skip
        """Each program computes every `num_programs`-th tile of heads, and a partial sum [d] of the
        weight's gradient.
        """
        column, wide = tl.arange(0, HALF)[None, :], tl.arange(0, 2 * HALF)[None, :]
        first_part, second_part = tl.zeros([HALF], tl.float32), tl.zeros([HALF], tl.float32)
        if REST:
            last_part = tl.zeros([REST], tl.float32)
        for number in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
            row = (number * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            token, head = row // count, row % count
            image, place = token // length, token % length
            real = (row < rows) & (column < half)
            incoming = gradient + image * g_outer + place * g_middle + head * g_inner
            pairs = tl.load(incoming + wide, mask=(row < rows) & (wide < 2 * half), other=0.0).to(
                tl.float32
            )
            left, right = tl.split(tl.reshape(pairs, [ROWS, HALF, 2]))
            angle = angles + place * 2 * half + 2 * column
            real_part, imaginary = (
                tl.load(angle, mask=real, other=0.0),
                tl.load(angle + 1, mask=real, other=0.0),
            )
            first, second = (
                left * real_part + right * imaginary,
                right * real_part - left * imaginary,
            )
            if REST:
                behind = tl.arange(0, REST)[None, :]
                there = (row < rows) & (behind < rest)
                last = tl.load(incoming + 2 * half + behind, mask=there, other=0.0).to(tl.float32)
            if NORM:
                scale = tl.load(scales + row, mask=row < rows, other=0.0)
                source = heads + image * outer + place * middle + head * inner
                x_first = tl.load(source + column, mask=real, other=0.0).to(tl.float32) * scale
                x_second = (
                    tl.load(source + half + column, mask=real, other=0.0).to(tl.float32) * scale
                )
                first_part += tl.sum(first * x_first, 0)
                second_part += tl.sum(second * x_second, 0)
                first *= tl.load(weight + column, mask=column < half, other=0.0)
                second *= tl.load(weight + half + column, mask=column < half, other=0.0)
                along = tl.sum(first * x_first + second * x_second, 1, keep_dims=True)
                if REST:
                    x_last = (
                        tl.load(source + 2 * half + behind, mask=there, other=0.0).to(tl.float32)
                        * scale
                    )
                    last_part += tl.sum(last * x_last, 0)
                    last *= tl.load(weight + 2 * half + behind, mask=behind < rest, other=0.0)
                    along += tl.sum(last * x_last, 1, keep_dims=True)
                along /= 2 * half + rest
                first, second = (
                    (first - x_first * along) * scale,
                    (second - x_second * along) * scale,
                )
                if REST:
                    last = (last - x_last * along) * scale
            target = out + image * o_outer + place * o_middle + head * o_inner
            tl.store(target + column, first.to(out.dtype.element_ty), mask=real)
            tl.store(target + half + column, second.to(out.dtype.element_ty), mask=real)
            if REST:
                tl.store(target + 2 * half + behind, last.to(out.dtype.element_ty), mask=there)
        if NORM:
            sums = parts + tl.program_id(0) * (2 * half + rest)
            flat = tl.arange(0, HALF)
            tl.store(sums + flat, first_part, mask=flat < half)
            tl.store(sums + half + flat, second_part, mask=flat < half)
            if REST:
                flat = tl.arange(0, REST)
                tl.store(sums + 2 * half + flat, last_part, mask=flat < rest)

    @triton.jit
    def _gated(gate, up, out, count, BLOCK: tl.constexpr):  # noqa: N803
        """Each program computes `BLOCK` numbers."""
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        real = index < count
        x = tl.load(gate + index, mask=real, other=0.0).to(tl.float32)
        gated = x * tl.sigmoid(x) * tl.load(up + index, mask=real, other=0.0).to(tl.float32)
        tl.store(out + index, gated.to(out.dtype.element_ty), mask=real)

    @triton.jit
    def _gated_back(gradient, gate, up, gate_gradient, up_gradient, count, BLOCK: tl.constexpr):  # noqa: N803
        """Each program computes `BLOCK` numbers."""
        index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        real = index < count
        incoming = tl.load(gradient + index, mask=real, other=0.0).to(tl.float32)
        x = tl.load(gate + index, mask=real, other=0.0).to(tl.float32)
        y = tl.load(up + index, mask=real, other=0.0).to(tl.float32)
        share = tl.sigmoid(x)
        tl.store(
            up_gradient + index, (incoming * x * share).to(up_gradient.dtype.element_ty), mask=real
        )
        tl.store(
            gate_gradient + index,
            (incoming * y * share * (1.0 + x * (1.0 - share))).to(gate_gradient.dtype.element_ty),
            mask=real,
        )
