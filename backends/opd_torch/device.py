"""Everything that depends on the device a backend runs on, in one record: made once, and passed
down.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from opd.errors import out_of_memory
from opd.memory import feature_bytes, host_memory, peak_resident
from opd_torch.objective import CHUNK_BYTES

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Device:
    """Where tensors live, the budgets of memory there, and what pays off there.

    The defaults are a CPU's; `this_device` says what a GPU does otherwise. No budget changes a
    result, apart from the order of sums.
    """

    torch: torch.device

    feature_bytes: int
    """Image features of a frozen tower that stay in memory from step to step; see
    `opd.memory.feature_bytes`.
    """

    fused: bool = False
    """Whether norms run in half precision on a GPU: `kernels.pointwise.HalfNorm`, and
    `kernels.fused` where Triton is installed.
    """

    checkpoint_above: int = 2 * 2**30
    """Bytes of activations that a backward may hold. A call with a larger estimate recomputes
    layers in its backward: all of them, or on a GPU those whose activations do not fit in the free
    memory.
    """

    uploaded_bytes: int = 0
    """Images that stay on the device between the passes of a step, so that no pass waits for the
    host to cut and copy them.
    """

    prefill_tokens: int = 16384
    """Prompt tokens that run together in a rollout. Many prompts may decode together, but their
    prefill holds more.
    """

    prompt_multiple: int = 1
    """The longest prompt is padded to a multiple of this many tokens: a GPU's matrix products of
    odd widths take several times as long.
    """

    check_every: int = 1
    """Token steps between checks for ended completions; on a GPU each check synchronises."""

    records_steps: bool = False
    """Whether token steps are recorded as CUDA graphs (`kernels.recorder`)."""

    recorded_rows: int = 256
    """Rows of its own that a completion reads at least in a recorded step. Recording a step takes
    as long as some ten steps.
    """

    compact_below: float = 0.75
    """Ended completions leave the batch when at most this share of its rows would stay, since
    leaving copies all caches.
    """

    head_block_bytes: int = CHUNK_BYTES
    """One array of the rows that pass together through everything but the head's products: on a CPU
    so few that they stay in its caches.
    """

    @property
    def gpu(self) -> bool:
        """Whether the device has memory of its own."""
        return bool(self.torch.type == "cuda")

    @property
    def name(self) -> str:
        """The device in words."""
        if self.gpu:
            return str(torch.cuda.get_device_name(self.torch))
        threads = torch.get_num_threads()
        return f"CPU, {threads} thread{'s' if threads > 1 else ''}"

    @property
    def peak_memory(self) -> int:
        """Largest number of bytes allocated on the GPU, or held by the process on the CPU."""
        if self.gpu:
            return int(torch.cuda.max_memory_allocated(self.torch))
        return peak_resident()


def this_device(name: str, dtype: str = "float32") -> Device:
    """The record of the device `name`, as torch names it, for computation in `dtype`."""
    device = torch.device(name)
    if device.type == "cuda":
        return Device(
            device,
            feature_bytes(torch.cuda.get_device_properties(device).total_memory),
            fused=dtype == "bfloat16",
            uploaded_bytes=2**29,
            prompt_multiple=64,
            check_every=8,
            records_steps=True,
        )
    block_bytes = 2**20 if device.type == "cpu" else CHUNK_BYTES
    return Device(device, feature_bytes(host_memory()), head_block_bytes=block_bytes)


def tells_out_of_memory(verb: Callable[P, R]) -> Callable[P, R]:
    """The verb, with torch's error of a full memory as the core's."""

    @wraps(verb)
    def told(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return verb(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error) from error

    return told
