"""Everything that depends on the device: one record, made once and passed down."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import mlx.core as mx

from opd.errors import out_of_memory
from opd.memory import feature_bytes, host_memory

P = ParamSpec("P")
R = TypeVar("R")

_FULL = re.compile("Unable to allocate|Attempting to allocate|Insufficient Memory")
"""How MLX says that a buffer does not fit: the allocator on both devices, and Metal."""


@dataclass(frozen=True)
class Device:
    """The device that MLX computes on: which calls it takes, and how many bytes they may hold.

    `this_device` makes the record. Any field can be replaced, so that a CPU runs what a GPU does.
    """

    name: str
    gpu: bool

    memory: int
    """Bytes that a GPU's working set should not exceed; 0 where MLX does not say."""

    fused_attention: bool
    """Computes attention without a gradient by `mx.fast.scaled_dot_product_attention`.

    On Metal that call keeps no scores; on a CPU it keeps them all.
    """

    compiles: bool
    """Compiles elementwise functions and token steps. For a CPU, MLX calls g++, for seconds."""

    steps_ahead: int
    """Token steps in flight before the host looks at a token, so that neither waits for the other.

    Completions that have ended run that much longer.
    """

    score_block_rows: int
    """Most rows of a block of attention scores: small blocks compute fewer masked scores."""

    score_block_bytes: int
    """Most bytes of a block of attention scores; about three such arrays are alive at a time."""

    head_block_bytes: int
    """Bytes of one array of the rows that go through the divergence together."""

    pixel_bytes: int
    """Bytes of images of one size that run through a vision tower together."""

    feature_bytes: int
    """Bytes of image features that a frozen tower's cache keeps from step to step."""

    kept_score_bytes: int = 2**24
    """Most bytes of scores that an attention call keeps for its backward; else it recomputes."""

    checkpoint_above: int = 2 * 2**30
    """Bytes of activations that a backward may hold without recomputing any layer."""

    prefill_tokens: int = 16384
    """Padded prompt tokens that a rollout runs together."""

    gradient_bytes: int = 2**24
    """Bytes of parameters whose gradient, or optimizer step, is computed at a time."""

    delta_segment: int = 256
    """Tokens of a gated delta net whose activations a backward holds; it recomputes longer rows.

    They take 1 MB a token in a layer of the 4B model.
    """

    cache_tokens: int = 64
    """Tokens of the first buffer of a completion's cache; each further buffer is twice as long."""

    compact_below: float = 0.75
    """Share of live rows at which decoding drops ended ones, which copies all keys and values."""


def this_device() -> Device:
    """MLX's default device."""
    gpu, info = mx.default_device() == mx.gpu, mx.device_info()
    return Device(
        name=str(info.get("device_name", "unknown device")),
        gpu=gpu,
        memory=int(info.get("max_recommended_working_set_size", 0)) if gpu else 0,
        fused_attention=gpu,
        compiles=gpu,
        steps_ahead=int(gpu),
        # On a CPU, blocks that fit in its caches.
        score_block_rows=1024 if gpu else 128,
        score_block_bytes=2**28 if gpu else 2**23,
        head_block_bytes=2**26 if gpu else 2**20,
        pixel_bytes=2**62 if gpu else 3 * 2**20,
        feature_bytes=feature_bytes(host_memory()),
    )


def tells_out_of_memory(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb, with MLX's error of a full memory, a RuntimeError, as the core's."""

    @wraps(verb)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except RuntimeError as error:
            if _FULL.search(str(error)):
                raise out_of_memory(error) from error
            raise

    return told
