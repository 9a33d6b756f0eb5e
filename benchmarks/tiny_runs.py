"""Runs of the embedded model that differ in settings of a recipe, on several seeds.

`compare` is the command line of a benchmark that has a table of such runs. Every run is a process
of one thread, and takes 400 steps: five minutes on one core. A run that the results hold is not run
again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

Prepare = Callable[[str, Any], None]
"""Called with a run's name and its trainer before training."""


def compare(
    module: str,
    description: str | None,
    settings: Mapping[str, Sequence[str]],
    picture: Callable[[dict[str, Any], Path], None] | None = None,
    prepare: Prepare = lambda name, trainer: None,
    before: Callable[[str], None] = lambda name: None,
) -> None:
    """Runs every entry of `settings` (name, and options of `--set`) on some seeds, and writes
    results/NAME.json, where NAME is the last word of `module`, by which new processes import the
    benchmark. `picture` draws the results into a file. `before` is called with the name of each
    entry that will run."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0: those of the preset")
    parser.add_argument(
        "--workers", type=int, default=2, help="runs side by side, of one thread each"
    )
    parser.add_argument("--only", choices=list(settings), help="one of the runs")
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, seed = arguments.one
        print(json.dumps(run(name, settings[name], int(seed), arguments.steps, prepare)))
        return
    stem = module.split(".")[-1]
    path = RESULTS / (f"{stem}_{arguments.steps}.json" if arguments.steps else f"{stem}.json")
    earlier = json.loads(path.read_text()) if path.exists() else {"runs": {}, "dates": {}}
    stored, dates = earlier["runs"], earlier["dates"]
    jobs = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in settings
        if arguments.only in (None, name) and str(seed) not in stored.get(name, {})
    ]
    for name in dict(jobs):
        before(name)
    with ThreadPoolExecutor(arguments.workers) as pool:
        for (name, seed), summary in zip(
            jobs,
            pool.map(lambda job: in_new_process(module, *job, arguments.steps), jobs),
            strict=True,
        ):
            stored.setdefault(name, {})[str(seed)] = summary
            dates[name] = str(date.today())
            before, after = (summary[when]["full_accuracy"] for when in ("before", "after"))
            print(f"{name}, seed {seed}: {before:.3f} -> {after:.3f}", file=sys.stderr)
            result = {
                "dates": dates,
                "machine": f"{platform.machine()}, one thread a run",
                "versions": versions(),
                "runs": stored,
            }
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(result, indent=1) + "\n")
    rows = {name: table_row(stored[name]) for name in settings if name in stored}
    if arguments.json:
        print(json.dumps(rows))
    else:
        show(rows)
    if picture and rows:
        picture(stored, path.with_suffix(".png"))


def in_new_process(module: str, name: str, seed: int, steps: int) -> dict[str, Any]:
    """Runs one entry with one seed in a new process, on one thread."""
    command = [sys.executable, "-m", module, "--one", name, str(seed), "--steps", str(steps)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed} failed:\n{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def run(
    name: str, settings: Sequence[str], seed: int, steps: int, prepare: Prepare
) -> dict[str, Any]:
    """Runs one entry; returns the run's summary and the curve of both accuracies."""
    from opd.run import recipe as recipes
    from opd.run.session import start

    options = [
        f"run.seed={seed}",
        "run.checkpoint_every=0",
        "measure.every=100",
        *settings,
        *([f"run.steps={steps}"] if steps else []),
    ]
    with tempfile.TemporaryDirectory() as folder:
        trainer = start(recipes.load("tiny", options), "cpu", Path(folder) / "run")
        prepare(name, trainer)
        summary = trainer.train()
        curve = [
            [row[key] for key in ("step", "full_accuracy", "crop_accuracy")]
            for row in trainer.folder.rows("accuracy.jsonl")
        ]
        return {**summary, "curve": curve}


def table_row(runs: dict[str, Any]) -> dict[str, Any]:
    """One control's results as means over the seeds."""

    def mean(*path: str) -> float:
        return float(
            np.mean(
                [run[path[0]] if len(path) == 1 else run[path[0]][path[1]] for run in runs.values()]
            )
        )

    return {
        "seeds": len(runs),
        "full_before": mean("before", "full_accuracy"),
        "full_after": mean("after", "full_accuracy"),
        "crop_before": mean("before", "crop_accuracy"),
        "crop_after": mean("after", "crop_accuracy"),
        "gap_closed": mean("gap_closed"),
        "gap_closed_each": [run["gap_closed"] for run in runs.values()],
        "upper_end_of_interval": max(run["gap_closed_interval"][1] for run in runs.values()),
        "seconds": mean("seconds"),
    }


def show(rows: dict[str, dict[str, Any]]) -> None:
    print(f"{'':30} {'full image':>16} {'crop':>16} {'gap closed':>11}  of each seed")
    for name, row in rows.items():
        full, crop = (
            f"{row[f'{view}_before']:.3f} -> {row[f'{view}_after']:.3f}"
            for view in ("full", "crop")
        )
        each = ", ".join(f"{value:.2f}" for value in row["gap_closed_each"])
        print(f"{name:30} {full:>16} {crop:>16} {row['gap_closed']:>11.2f}  {each}")


def versions() -> dict[str, str]:
    names: Sequence[str] = ("vision-opd", "torch", "transformers", "numpy", "pillow")
    return {name: version(name) for name in names}
