"""The device record: everything that depends on the device, made once and passed down."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import mlx.core as mx

from opd.errors import out_of_memory
from opd.memory import ACTIVATION_BYTES, PREFILL_TOKENS, feature_bytes, host_memory
from opd.planner import Machine

P = ParamSpec("P")
R = TypeVar("R")

_FULL = re.compile("Unable to allocate|Attempting to allocate|Insufficient Memory")
"""MLX's messages for a full memory: of the allocators on CPU and GPU, and of Metal."""


@dataclass(frozen=True)
class Device:
    """MLX's device, the budgets of memory, and which optimisations pay off there.

    `this_device` makes the record. A test can replace any field, so that a CPU runs a GPU's path. A
    budget changes results only by the order of sums.
    """

    name: str
    gpu: bool

    memory: int
    """The recommended bytes of a GPU's working set; 0 if MLX does not report them."""

    fused_attention: bool
    """Whether attention without a gradient uses `mx.fast.scaled_dot_product_attention`, which keeps
    all scores on a CPU and none on Metal."""

    compiles: bool
    """Whether elementwise functions and token steps are compiled. For a CPU MLX would call g++,
    which takes seconds."""

    steps_ahead: int
    """Token steps that are launched before the host reads a token, so that neither waits for the
    other. Ended completions run this many steps too long."""

    score_block_rows: int
    """The most rows of a block of attention scores; smaller blocks compute fewer masked scores."""

    score_block_bytes: int
    """The most bytes of a block of attention scores; about three such arrays are alive at a time.
    """

    head_block_bytes: int
    """Bytes of one array [rows, V] of a block of the divergence. On a CPU a block fits into the
    processor's caches."""

    pixel_bytes: int
    """Bytes of images of one size that run through a vision tower together."""

    feature_bytes: int
    """Bytes of image features that the cache of a frozen tower may hold (`opd.memory`)."""

    kept_score_bytes: int = 2**24
    """The most bytes of scores that one attention keeps for the backward, instead of recomputing
    them."""

    checkpoint_above: int = ACTIVATION_BYTES
    """Bytes of activations that a backward may hold. Above this estimate the backward recomputes
    the layers whose activations do not fit in `free_bytes`."""

    free_bytes: int | None = 0
    """Bytes of activations that a backward holds when it recomputes layers; with 0 it recomputes
    all. None: as many as are free on the GPU then."""

    prefill_tokens: int = PREFILL_TOKENS
    """Prompt tokens, with padding, that run together in a rollout's prefill."""

    gradient_bytes: int = 2**24
    """Bytes of parameters whose gradients, or optimizer steps, are computed together."""

    delta_segment: int = 256
    """Tokens of a gated delta net whose activations a backward holds at a time; they take 1 MB per
    token in a layer of the 4B model. Longer rows are recomputed segment by segment."""

    cache_tokens: int = 64
    """Tokens of a completion's first buffer; a full buffer is replaced by one of twice the size."""

    compact_below: float = 0.75
    """Ended completions are dropped when at most this share of the batch's rows would remain,
    because dropping them copies all caches."""

    @property
    def budgets(self) -> dict[str, int]:
        """The budgets that `opd backends` shows, by field."""
        names = ("checkpoint_above", "prefill_tokens", "feature_bytes")
        return {name: getattr(self, name) for name in names}


def this_device(checkpoint_above: int = ACTIVATION_BYTES) -> Device:
    """MLX's default device; a backward may hold `checkpoint_above` bytes without recomputing any
    layer.
    """
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
        checkpoint_above=checkpoint_above,
        free_bytes=None if gpu else 0,
    )


def machine() -> Machine:
    """The Mac's GPU, or the processor, for a plan."""
    device, memory = this_device(), host_memory()

    def product(rows: int, side: int, dtype: str) -> Callable[[], object]:
        a, b = (mx.ones((n, side), dtype=getattr(mx, dtype)) for n in (rows, side))
        return lambda: mx.eval(a @ b)

    if not device.gpu:
        # Products with 4-bit weights are plain loops there, and as fast as others on Metal.
        name = "CPU, where products with 4-bit weights take longer than planned"
        return Machine(name, memory, 0.9, False, product)
    return Machine(device.name, memory, (device.memory or 0.75 * memory) / memory, True, product)


def tells_out_of_memory(verb: Callable[P, R]) -> Callable[P, R]:
    """Wraps a verb so that MLX's error for a full memory becomes `opd.errors.OutOfMemory`."""

    @wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except RuntimeError as error:
            if _FULL.search(str(error)):
                raise out_of_memory(error) from error
            raise

    return wrapped
