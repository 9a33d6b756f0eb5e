"""Activations from plain operations, because MLX compiles those of `mlx.nn`, on a CPU with g++."""

from __future__ import annotations

import math

import mlx.core as mx


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate * sigmoid(gate) * up."""
    return gate * mx.sigmoid(gate) * up


def gelu(x: mx.array) -> mx.array:
    """GELU's tanh form, written with a sigmoid, which takes one exponential."""
    return x * mx.sigmoid(x * (1.5957691216057308 + 0.07135481627260025 * mx.square(x)))


def exact_gelu(x: mx.array) -> mx.array:
    """x * Phi(x), where Phi is the cumulative normal distribution."""
    return x * (1 + mx.erf(x / math.sqrt(2))) / 2
