"""The device record: everything that depends on the device, made once and passed down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, Protocol, TypeAlias, TypeVar

import torch

from opd.errors import BackendError, out_of_memory
from opd.memory import (
    ACTIVATION_BYTES,
    CHUNK_BYTES,
    PREFILL_TOKENS,
    feature_bytes,
    host_memory,
    peak_resident,
)
from opd.planner import Machine

P = ParamSpec("P")
R = TypeVar("R")


class RecordedStep(Protocol):
    """A token step that was recorded."""

    def replay(self) -> None:
        """Runs the step again."""


RecordStep: TypeAlias = Callable[[Callable[[], None]], RecordedStep]
"""Records a step without running it."""


def record_graph(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Records `step` as a CUDA graph without running it.

    `torch.cuda.graph` would first return all cached memory to the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


@dataclass(frozen=True)
class Device:
    """torch's device, the budgets of memory, and which optimisations pay off there.

    The defaults are for a CPU; `this_device` changes them for a GPU. A budget changes results only
    by the order of sums.
    """

    torch: torch.device

    feature_bytes: int
    """Bytes of image features that the cache of a frozen tower may hold (`opd.memory`)."""

    fused: bool = False
    """Whether norms return half precision (`kernels.pointwise.HalfNorm`), with `kernels.fused` if
    Triton is installed.
    """

    checkpoint_above: int = ACTIVATION_BYTES
    """Bytes of activations that a backward may hold. Above this estimate the backward recomputes
    the layers whose activations do not fit in `free_bytes`.
    """

    free_bytes: int | None = 0
    """Bytes of activations that a backward holds when it recomputes layers; with 0 it recomputes
    all. None: as many as are free on the GPU then.
    """

    uploaded_bytes: int = 0
    """Bytes of images that stay on the device between the passes of a step, so that a pass does not
    wait until the host has cut and copied them. 0 turns this off.
    """

    prefill_tokens: int = PREFILL_TOKENS
    """Prompt tokens that run together in a rollout's prefill, which needs more memory than
    decoding.
    """

    prompt_multiple: int = 1
    """The longest prompt is padded to a multiple of this many tokens, because on a GPU matrix
    products of odd widths take several times as long.
    """

    check_every: int = 1
    """Token steps between checks for ended completions; on a GPU each check synchronises."""

    record_step: RecordStep | None = None
    """Records a token step to replay it (`kernels.recorder`): as a CUDA graph on a GPU. None: no
    step is recorded.
    """

    recorded_rows: int = 256
    """The fewest completion keys that a recorded step reads. Each doubling records a new step,
    which takes as long as about ten steps.
    """

    cache_tokens: int = 64
    """Tokens of a completion's first buffer; a full buffer is replaced by one of twice the size."""

    compact_below: float = 0.75
    """Ended completions are dropped when at most this share of the batch's rows would remain,
    because dropping them copies all caches.
    """

    head_block_bytes: int = CHUNK_BYTES
    """Bytes of one array [rows, V] of a block of the divergence. On a CPU a block fits into the
    processor's caches.
    """

    @property
    def budgets(self) -> dict[str, int]:
        """The budgets that `opd backends` shows, by field."""
        names = ("checkpoint_above", "prefill_tokens", "feature_bytes", "uploaded_bytes")
        return {name: getattr(self, name) for name in names}

    @property
    def gpu(self) -> bool:
        """Whether the device is a GPU."""
        return bool(self.torch.type == "cuda")

    @property
    def name(self) -> str:
        """The name of the GPU, or the CPU's number of threads."""
        if self.gpu:
            return str(torch.cuda.get_device_name(self.torch))
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"

    @property
    def peak_memory(self) -> int:
        """The peak of bytes allocated on the GPU, or resident in the process on a CPU."""
        if self.gpu:
            return int(torch.cuda.max_memory_allocated(self.torch))
        return peak_resident()


def this_device(
    name: str, dtype: str = "float32", checkpoint_above: int = ACTIVATION_BYTES
) -> Device:
    """The record of the device `name`, as torch names it, for computation in `dtype`; a backward
    may hold `checkpoint_above` bytes without recomputing any layer.
    """
    device = torch.device(name)
    if device.type == "cuda":
        return Device(
            device,
            feature_bytes(torch.cuda.get_device_properties(device).total_memory),
            fused=dtype == "bfloat16",
            uploaded_bytes=2**29,
            prompt_multiple=64,
            check_every=8,
            record_step=record_graph,
            checkpoint_above=checkpoint_above,
            free_bytes=None,
        )
    block_bytes = 2**20 if device.type == "cpu" else CHUNK_BYTES
    return Device(
        device,
        feature_bytes(host_memory()),
        checkpoint_above=checkpoint_above,
        head_block_bytes=block_bytes,
    )


def machine(gpu: bool) -> Machine:
    """The first GPU, or the processor, for a plan. Raises BackendError without a GPU."""
    if gpu and not torch.cuda.is_available():
        raise BackendError("torch sees no CUDA GPU on this machine; name one with --device")
    device = torch.device("cuda" if gpu else "cpu")

    def product(rows: int, side: int, dtype: str) -> Callable[[], object]:
        kind = getattr(torch, dtype)
        a, b = (torch.ones(n, side, device=device, dtype=kind) for n in (rows, side))
        return lambda: torch.mm(a, b)[0, 0].item()  # which waits for the result

    if not gpu:
        name = this_device("cpu").name
        return Machine(name, host_memory(), 0.9, False, product, resident=True)
    about = torch.cuda.get_device_properties(device)
    return Machine(about.name, about.total_memory, 0.95, True, product)


def tells_out_of_memory(verb: Callable[P, R]) -> Callable[P, R]:
    """Wraps a verb so that torch's out-of-memory error becomes `opd.errors.OutOfMemory`."""

    @wraps(verb)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error) from error

    return wrapped
