"""Softmax and activations without MLX's own exponential where that is slow: their time is the
exponential's, and its power's is less."""

from __future__ import annotations

import math
import platform
from typing import cast

import mlx.core as mx
import mlx.nn as nn

SLOW_EXPONENTIAL = platform.machine() == "x86_64" and mx.default_device() == mx.cpu
"""There MLX's exp takes 12 ns a number, and its power takes 5."""

BLOCK = 8**3
"""Numbers that are summed together: about the root of a vocabulary."""

FEW = 128
"""Numbers that may be added one after the other."""


def exponential(x: mx.array) -> mx.array:
    """exp(x) in float32, or in float64 where x is; it has a gradient where the exponential is not
    slow."""
    if x.dtype == mx.float64:
        return mx.exp(x)
    x = x.astype(mx.float32)
    # The base must be a number of 24 bits: e is off by 3e-8 of x, its 64th power by 6e-10, and a
    # division by 64 rounds nothing.
    return mx.power(mx.array(math.exp(64)), x * (1 / 64)) if SLOW_EXPONENTIAL else mx.exp(x)


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis, computed in float32."""
    return (
        cast("mx.array", _softmax_by_power(scores))
        if SLOW_EXPONENTIAL
        else mx.softmax(scores, axis=-1, precise=True)
    )


def log_softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Logarithms of the softmax over the last axis, and the softmax."""
    if not SLOW_EXPONENTIAL:
        logarithms = scores - mx.logsumexp(scores, -1, keepdims=True)
        return logarithms, mx.exp(logarithms)
    scores = scores - scores.max(-1, keepdims=True)
    powers = exponential(scores)
    whole = total(powers)
    return scores - mx.log(whole), powers / whole


def in_blocks(values: mx.array) -> mx.array:
    """The last axis, filled up with zeros, in blocks: [..., V] becomes [..., blocks, BLOCK]."""
    *rows, width = values.shape
    if width % BLOCK:
        values = mx.pad(values, [*((0, 0) for _ in rows), (0, -width % BLOCK)])
    return values.reshape(*rows, -1, BLOCK)


def block_sums(values: mx.array) -> mx.array:
    """Sums [..., blocks] of what `in_blocks` gives, by eights: one number after the other, 511
    rare ids beside a likely one are lost."""
    return values.reshape(*values.shape[:-1], 8, 8, 8).sum(-3).sum(-2).sum(-1)


def total(values: mx.array) -> mx.array:
    """The sum [..., 1] over the last axis, of a whole vocabulary too: one number after the other,
    float32 loses 1e-3 of it.

    Parts of equal width need no copy that is filled up; the widths of published vocabularies have
    such parts.
    """
    while (width := values.shape[-1]) > FEW:
        part = next((size for size in range(FEW, 15, -1) if width % size == 0), None)
        parts = None if part is None else values.reshape(*values.shape[:-1], -1, part)
        values = block_sums(in_blocks(values)) if parts is None else parts.sum(-1)
    return values.sum(-1, keepdims=True)


def sigmoid(x: mx.array) -> mx.array:
    """1 / (1 + exp(-x))."""
    return cast("mx.array", _sigmoid_by_power(x)) if SLOW_EXPONENTIAL else mx.sigmoid(x)


def gelu(x: mx.array) -> mx.array:
    """The tanh form of GELU as x * sigmoid: the same function, without the power and the
    hyperbolic cosine of MLX's own."""
    return x * sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * mx.square(x)))


def exact_gelu(x: mx.array) -> mx.array:
    """x * Phi(x), with the normal distribution's integral to 1.5e-7."""
    if not SLOW_EXPONENTIAL:
        return cast("mx.array", nn.gelu(x))
    value, *_ = cast("tuple[mx.array, ...]", _gelu_by_power(x))
    return value


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate * sigmoid(gate) * up."""
    if not SLOW_EXPONENTIAL:
        return cast("mx.array", nn.silu(gate) * up)
    value, _ = cast("tuple[mx.array, mx.array]", _swiglu_by_power(gate, up))
    return value


@mx.custom_function
def _softmax_by_power(scores: mx.array) -> mx.array:
    powers = exponential(scores - scores.max(-1, keepdims=True))
    return (powers / powers.sum(-1, keepdims=True)).astype(scores.dtype)


@_softmax_by_power.vjp
def _softmax_slope(scores: mx.array, slope: mx.array, weights: mx.array) -> mx.array:
    weighted = slope * weights
    return weighted - weights * weighted.sum(-1, keepdims=True)


@mx.custom_function
def _sigmoid_by_power(x: mx.array) -> mx.array:
    return (1.0 / (1.0 + exponential(-x))).astype(x.dtype)


@_sigmoid_by_power.vjp
def _sigmoid_slope(x: mx.array, slope: mx.array, value: mx.array) -> mx.array:
    return slope * (value - mx.square(value))


@mx.custom_function
def _swiglu_by_power(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    """The value, and for the backward the sigmoid."""
    let = (1.0 / (1.0 + exponential(-gate))).astype(gate.dtype)
    return gate * let * up, let


@_swiglu_by_power.vjp
def _swiglu_slopes(
    given: tuple[mx.array, ...], slopes: tuple[mx.array, ...], found: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    (gate, up), slope, let = given, slopes[0], found[1]
    through = gate * let
    return slope * up * (let + through * (1.0 - let)), slope * through


@mx.custom_function
def _gelu_by_power(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The value, and for the backward exp(-x^2 / 2) and the integral beyond |x|: Abramowitz and
    Stegun, 7.1.26."""
    size = mx.abs(x.astype(mx.float32))
    bell = exponential(-0.5 * mx.square(size))
    t = 1.0 / (1.0 + 0.2316418882663604 * size)
    tail = (
        bell
        * t
        * (
            0.127414796
            + t * (-0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145)))
        )
    )
    return (mx.maximum(x, 0.0) - size * tail).astype(x.dtype), bell, tail


@_gelu_by_power.vjp
def _gelu_slope(x: mx.array, slopes: tuple[mx.array, ...], found: tuple[mx.array, ...]) -> mx.array:
    _, bell, tail = found
    integral = mx.where(x > 0, 1.0 - tail, tail)
    return (slopes[0] * (integral + 0.3989422804014327 * x * bell)).astype(x.dtype)
