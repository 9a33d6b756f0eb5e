"""Devices: how fast they multiply matrices and read memory, and how much they hold.

Published figures stand in devices.csv, in TFLOP/s, GB/s and GB; this machine is recognised or
measured. Nothing reaches its peak all of the time: a step is taken to reach shares of it.
"""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files

from opd.errors import RecipeError, nearest
from opd.plan.work import Stage
from opd.planner import Machine, Planner

HERE = "this machine"

MATMUL_SHARE, BANDWIDTH_SHARE = 0.4, 0.7
"""Shares of a published peak that matrix products reach (0.3 to 0.5 is usual), and moved bytes."""

HERE_MATMUL_SHARE, HERE_BANDWIDTH_SHARE = 0.7, 0.3
"""Shares of what is measured here (`benchmarks.plan_against_step`): a processor multiplies the few
rows of a token step well below the speed at which it copies."""

MEASURE_SECONDS, SIDE, GPU_SIDE, WIDE = 0.4, 768, 4096, 8192
"""Seconds of a measurement; rows of matrices that are multiplied, on a processor and a GPU, and of
one that is only read."""


@dataclass(frozen=True)
class Device:
    """`matmul` FLOP/s by type of numbers, dense; `bandwidth` bytes a second; `memory` bytes, of
    which a run may take the share `usable`; `memories` that it is sold with; `backend` that runs on
    it."""

    name: str
    matmul: dict[str, float]
    bandwidth: float
    memory: float
    usable: float
    backend: str
    source: str
    matmul_share: float = MATMUL_SHARE
    bandwidth_share: float = BANDWIDTH_SHARE
    memories: tuple[float, ...] = ()

    def seconds(self, stage: Stage, dtype: str) -> float:
        """Products or what they read, whichever is longer, and the passes between them."""
        bandwidth = self.bandwidth_share * self.bandwidth
        products = stage.operations / (self.matmul_share * self.matmul[dtype])
        return max(products, stage.moved / bandwidth) + stage.passed / bandwidth


def _published() -> dict[str, Device]:
    devices, text = {}, (files("opd.plan") / "devices.csv").read_text(encoding="utf-8")
    for row in csv.DictReader(text.splitlines()):
        matmul = {name: 1e12 * float(row[name]) for name in ("float32", "bfloat16")}
        sizes = tuple(1e9 * float(size) for size in row["memories"].split())
        rates = matmul, 1e9 * float(row["bandwidth"]), sizes[-1], float(row["usable"])
        about = row["backend"], row["source"]
        devices[row["name"]] = Device(row["name"], *rates, *about, memories=sizes)
    return devices


DEVICES = _published()


def device(name: str, planner: Callable[[], Planner], memory: float | None = None) -> Device:
    """The device of that name, whatever its case, with `memory` GB or the largest that it is sold
    with.

    A name may end in its memory ("M4 Max 64 GB"). `this machine` is what the planner of its backend
    knows of it. Raises RecipeError, which names the nearest.
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
    """This machine's device: one of DEVICES with its own memory, or measured in some seconds."""
    memory, name = float(here.memory), here.name.casefold()
    named = [one for one in DEVICES if one.casefold() in name and "laptop" not in name]
    if named:
        known = DEVICES[max(named, key=len)]
        known = replace(known, name=HERE, memory=memory, usable=here.usable, memories=())
        return replace(known, source=f"{here.name}; {known.source}")

    def rate(rows: int, side: int, dtype: str) -> float:
        return 2.0 * rows * side**2 * _per_second(here.product(rows, side, dtype), here.gpu)

    side = GPU_SIDE if here.gpu else SIDE
    types = ("float32", "bfloat16") if here.gpu else ("float32",)
    matmul = {dtype: rate(side, side, dtype) for dtype in types}
    # One row reads a matrix larger than any cache, as a token step reads weights.
    rates = {"bfloat16": matmul["float32"], **matmul}, 2.0 * rate(1, WIDE, "float32")
    source = f"{here.name}, measured in {' and '.join(types)}"
    shares = HERE_MATMUL_SHARE, HERE_BANDWIDTH_SHARE
    return Device(HERE, *rates, memory, here.usable, "auto", source, *shares)


def _per_second(run: Callable[[], object], gpu: bool) -> float:
    """Calls a second, at the fastest within MEASURE_SECONDS, after one call to warm up.

    A processor works itself: its time is the call's own on a busy machine.
    """
    run()
    fastest, end = float("inf"), time.perf_counter() + MEASURE_SECONDS
    while (started := time.perf_counter()) < end:
        used = time.process_time()
        run()
        seconds = time.perf_counter() - started
        fastest = min(fastest, seconds, seconds if gpu else time.process_time() - used)
    return 1.0 / fastest
