"""Runs the processes of one run, for tests."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from opd import registry
from opd.objective import Objective
from opd.types import ModelOptions, Update

# So large an epsilon makes the step proportional to the clipped gradient.
STEP = Update(1.0, epsilon=1.0, gradient_clip=0.1)
OBJECTIVE = Objective(top_k=20)


def one_step(
    name: str, folder: Path, groups: bytes, out: Path, environment: Mapping[str, str]
) -> None:
    """A process of two: takes a step on its part of the pickled groups, and writes what it found to
    `out`."""
    os.environ.update(environment)
    backend = registry.load(name, ModelOptions(folder))
    given = pickle.loads(groups)
    mine = (given[:2], given[2:])[backend.rank]
    backend.accumulate(mine, OBJECTIVE)
    result = backend.apply(STEP)
    total = backend.total(np.array([1.0, len(mine)]))
    written = out / f"written-{backend.rank}"
    (written / "state").mkdir(parents=True)
    backend.save(written / "state")
    backend.export(written / "model", "model")
    file = out / f"{backend.rank}.npz"
    np.savez(file, norm=result.gradient_norm, total=total, **backend.tensors("student"))


def run_side_by_side(
    name: str, folder: Path, groups: bytes, out: Path, environments: Sequence[Mapping[str, str]]
) -> list[int | None]:
    """The exit codes of processes that run `one_step`, one in each environment.

    On Linux they are forks of a process that has imported the backends, which takes ten seconds. On
    a Mac a process must not fork once it has talked to Metal.
    """
    context = multiprocessing.get_context("forkserver")
    if sys.platform == "linux":
        context.set_forkserver_preload(["opd_torch.backend", "opd_mlx.backend"])
    running = [
        context.Process(target=one_step, args=(name, folder, groups, out, environment))
        for environment in environments
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(120)
    return [process.exitcode for process in running]
