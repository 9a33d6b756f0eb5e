"""Devices: how fast they multiply matrices and read memory, and how much they hold.

devices.csv holds published figures in TFLOP/s, GB/s and GB; this machine is recognised or measured.
No step runs at a device's peak, so a plan assumes shares of the peak.
"""

from __future__ import annotations

import csv
import re
import time
import timeit
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files

from opd.errors import RecipeError, nearest
from opd.plan.work import Stage
from opd.planner import Machine, Planner

HERE = "this machine"
HERE_MATMUL_SHARE, HERE_BANDWIDTH_SHARE = 0.7, 0.3
"""Shares of the peaks measured here (`benchmarks.plan_against_step`): a processor multiplies the
few rows of a token step well below the speed at which it copies."""

REPEATS, SIDE, GPU_SIDE, WIDE = 10, 768, 4096, 8192
"""Calls of a measurement; rows of the matrices that it multiplies, on a processor and on a GPU, and
rows of a matrix that it only reads."""


@dataclass(frozen=True)
class Device:
    """`matmul`: dense FLOP/s by type of numbers. `bandwidth`: bytes a second. `memory`: bytes, of
    which a run may take the share `usable`. `memories`: sizes that the device is sold with.
    `backend`: the backend that runs on the device. `source` of the figures. Shares of the peaks
    that products (0.3 to 0.5 is usual) and reads reach."""

    name: str
    matmul: dict[str, float]
    bandwidth: float
    memory: float
    usable: float
    backend: str
    source: str
    matmul_share: float = 0.4
    bandwidth_share: float = 0.7
    memories: tuple[float, ...] = ()

    def seconds(self, stage: Stage, dtype: str) -> float:
        """Seconds of products, or of their reads if those take longer, and of passes between."""
        bandwidth = self.bandwidth_share * self.bandwidth
        products = stage.operations / (self.matmul_share * self.matmul[dtype])
        return max(products, stage.moved / bandwidth) + stage.passed / bandwidth


def _published(row: dict[str, str]) -> Device:
    """The device of a row of devices.csv."""
    matmul = {dtype: 1e12 * float(row[dtype]) for dtype in ("float32", "bfloat16")}
    sizes = tuple(1e9 * float(size) for size in row["memories"].split())
    rates = matmul, 1e9 * float(row["bandwidth"]), sizes[-1], float(row["usable"])
    return Device(row["name"], *rates, row["backend"], row["source"], memories=sizes)


with (files("opd.plan") / "devices.csv").open(encoding="utf-8") as _table:
    DEVICES = {row["name"]: _published(row) for row in csv.DictReader(_table)}


def device(name: str, planner: Callable[[], Planner], memory: float | None = None) -> Device:
    """The device called `name`, in any case, with `memory` GB or else the largest of `memories`.

    A name may end in the memory ("M4 Max 64 GB"). The `planner` of a backend describes `this
    machine`. Raises RecipeError, which names the nearest device.
    """
    known = {one.casefold(): one for one in (*DEVICES, HERE)}
    sized = re.fullmatch(r"(.*\S)\s+(\d+)\s?gb", name.casefold())
    plain = sized[1] if sized else name.casefold()
    if plain not in known:
        close = get_close_matches(plain, known, n=1, cutoff=0.5)
        wanted = nearest(known[close[0]] if close else plain, known.values())
        raise RecipeError(f"--device '{name}': no such device; {wanted}")
    chosen = this_machine(planner().machine()) if known[plain] == HERE else DEVICES[known[plain]]
    size = 1e9 * float(memory or (sized[2] if sized else 0))
    # Cards are named after GiB.
    exact = next((one for one in chosen.memories if 0 <= one - size < 0.08 * size), size)
    return replace(chosen, memory=exact, memories=()) if size else chosen


def this_machine(here: Machine) -> Device:
    """This machine's device: one of DEVICES with this machine's memory, or measured in seconds."""
    memory, name = float(here.memory), here.name.casefold()
    named = [one for one in DEVICES if one.casefold() in name and "laptop" not in name]
    if named:
        known = DEVICES[max(named, key=len)]
        source = f"{here.name}; {known.source}"
        known = replace(known, name=HERE, source=source, memory=memory)
        return replace(known, usable=here.usable, memories=())

    def rate(rows: int, side: int, dtype: str) -> float:
        """FLOP/s at the fastest of REPEATS calls, after one to warm up. On a processor a call may
        take less processor time than time, if the machine is busy."""
        run = here.product(rows, side, dtype)
        clocks = (time.perf_counter,) if here.gpu else (time.perf_counter, time.process_time)
        run()
        fastest = min(min(timeit.repeat(run, "", clock, REPEATS, 1)) for clock in clocks)
        return 2.0 * rows * side**2 / fastest

    side, dtypes = (GPU_SIDE, ("float32", "bfloat16")) if here.gpu else (SIDE, ("float32",))
    matmul = {dtype: rate(side, side, dtype) for dtype in dtypes}
    # One row reads a matrix larger than any cache, as a token step reads weights.
    rates = {"bfloat16": matmul["float32"], **matmul}, 2.0 * rate(1, WIDE, "float32")
    source = f"{here.name}, measured in {' and '.join(dtypes)}"
    shares = HERE_MATMUL_SHARE, HERE_BANDWIDTH_SHARE
    return Device(HERE, *rates, memory, here.usable, "auto", source, *shares)
