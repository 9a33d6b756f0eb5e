"""Devices: how fast they multiply matrices, read memory, and how much they hold; published figures, or measured here.

Nothing reaches its peak all of the time. Of published peaks a step is taken to reach the shares that are usual for training; of what is
measured here, with the backend's own products, those of `benchmarks.plan_against_step`.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

from opd.errors import RecipeError, nearest
from opd.memory import host_memory

HERE = "this machine"

MATMUL_SHARE, BANDWIDTH_SHARE = 0.4, 0.7
"""Shares of a published peak that matrix products reach (0.3 to 0.5 is usual for training of models this size), and moved bytes."""

HERE_MATMUL_SHARE, HERE_BANDWIDTH_SHARE = 0.7, 0.3
"""The same of what is measured here: a processor multiplies the few rows of a token step well below the speed at which it copies."""

MEASURE_SECONDS = 0.4
"""For each of the two measurements."""

SIDE = 768
"""Rows and columns of the matrices that are multiplied."""

PACKED_ROWS = 32
"""Rows that are multiplied by a matrix in 4 bits."""


@dataclass(frozen=True)
class Device:
    """`matmul` FLOP/s by type of numbers, dense; `bandwidth` bytes a second; `memory` bytes, of which a run may take the share `usable`;
    the `backend` that runs on it; the shares of `matmul` and `bandwidth` that a step is taken to reach.

    `packed`: FLOP/s of products with weights in 4 bits, and with their transposes; None where they take as long as any.
    """

    name: str
    matmul: dict[str, float]
    bandwidth: float
    memory: float
    usable: float
    backend: str
    source: str
    matmul_share: float = MATMUL_SHARE
    bandwidth_share: float = BANDWIDTH_SHARE
    packed: tuple[float, float] | None = None


DEVICES = {
    device.name: device
    for device in (
        Device(
            "M4 Max",
            # 40 cores of 128 lanes at 1.8 GHz, two operations each; half precision is no faster.
            {"float32": 18.4e12, "bfloat16": 18.4e12},
            546e9,
            128e9,
            0.75,  # what macOS lets the GPU have
            "mlx",
            "Apple, 2024-10-30 (40 cores); TFLOP/s from lanes and clock",
        ),
        Device(
            "RTX 4090",
            {"float32": 82.6e12, "bfloat16": 165.2e12},
            1008e9,
            24 * 2**30,
            0.95,  # the rest is CUDA's own
            "cuda",
            "NVIDIA Ada whitepaper, dense, float32 sums",
        ),
        Device(
            "H200",
            {"float32": 67e12, "bfloat16": 989e12},
            4.8e12,
            141e9,
            0.95,
            "cuda",
            "NVIDIA H200 datasheet, SXM, dense",
        ),
    )
}


def device(name: str, backend: str | None = None) -> Device:
    """The device of that name, whatever its case; `this machine` is measured, as `backend` computes. Raises RecipeError, which names the
    nearest."""
    known = {one.casefold(): one for one in (*DEVICES, HERE)}
    if name.casefold() not in known:
        wanted = nearest(name.casefold(), known)
        for folded, one in known.items():
            wanted = wanted.replace(folded, one)
        raise RecipeError(f"--device '{name}': no such device; {wanted}")
    found = known[name.casefold()]
    return this_machine(backend) if found == HERE else DEVICES[found]


def this_machine(backend: str | None = None) -> Device:
    """This machine's processor, by a matrix product of `backend` and a copy in numpy, which take less than a second together."""
    library, product = _product(backend)
    speed = 2.0 * SIDE**3 * _per_second(product)
    # Larger than any cache: weights are read from memory in every token step.
    source = np.ones(2**25, np.float32)
    target = np.empty_like(source)
    # A copy reads and writes.
    bandwidth = 2.0 * source.nbytes * _per_second(lambda: np.copyto(target, source))
    memory = float(host_memory())
    rates = {"float32": speed, "bfloat16": speed}
    said = f"its processor, measured now with {library} in float32"
    packed = _packed() if library == "mlx" and platform.system() != "Darwin" else None
    return Device(HERE, rates, bandwidth, memory, 0.9, "cpu", said, HERE_MATMUL_SHARE, HERE_BANDWIDTH_SHARE, packed)


def _product(backend: str | None) -> tuple[str, Callable[[], object]]:
    """A product of two matrices of SIDE x SIDE, and whose it is: the backend's, each of which brings a library of its own; else numpy's."""
    name = "mlx" if backend == "mlx" else "torch"
    if find_spec(name) is None:
        a = np.ones((SIDE, SIDE), np.float32)
        return "numpy", lambda: a @ a
    if name == "torch":
        torch: Any = import_module("torch")
        b = torch.ones(SIDE, SIDE)
        return name, lambda: torch.mm(b, b)
    mx: Any = import_module("mlx.core")
    c = mx.ones((SIDE, SIDE))
    return name, lambda: mx.eval(mx.matmul(c, c, stream=mx.cpu))


def _packed() -> tuple[float, float]:
    """FLOP/s of MLX's products with weights in 4 bits, and with their transposes, on a processor.

    There they are plain loops: 2.3 and 8.1 GFLOP/s on a core with 90 in float32, from one row to 256 and at any width. On Metal they keep
    up with half precision.
    """
    mx: Any = import_module("mlx.core")
    rows, weights = mx.ones((PACKED_ROWS, SIDE)), mx.quantize(mx.ones((SIDE, SIDE)), stream=mx.cpu)

    def product(transpose: bool) -> Callable[[], object]:
        return lambda: mx.eval(mx.quantized_matmul(rows, *weights, transpose=transpose, stream=mx.cpu))

    plain, turned = (2.0 * PACKED_ROWS * SIDE**2 * _per_second(product(transpose)) for transpose in (True, False))
    return plain, turned


def _per_second(run: Callable[[], object]) -> float:
    """Calls a second, at the fastest call within MEASURE_SECONDS; the first, which warms up, does not count.

    Of one thread on a busy machine the processor's time is the call's own, of several threads the clock's is.
    """
    run()
    fastest, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    while (started := time.perf_counter()) < end:
        used = time.process_time()
        run()
        fastest = min(fastest, time.perf_counter() - started, time.process_time() - used)
    return 1.0 / fastest
