"""How much faster is the default run than at another commit, and does it compute the same?

    python -m benchmarks.default_run --before REVISION [--backend cpu|mlx] [--steps 40]
                                     [--count 200] [--json]

Both sides run `opd train` with the preset `tiny` (the embedded model) from the sources of their
commit. They take turns, each run in a new process with one thread. The seconds come from the run's
summary: training and measuring, without start-up. `--steps 0 --count 0` runs the whole preset.
The report compares the losses of all steps and the accuracies before and after; they may differ by
rounding, which some hundred steps amplify. The benchmark needs a git checkout.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measuring

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--before", required=True, help="a commit to compare with")
    parser.add_argument("--backend", choices=("cpu", "mlx"), default="cpu")
    parser.add_argument("--steps", type=int, default=40, help="0: those of the preset")
    parser.add_argument(
        "--count",
        type=int,
        default=200,
        help="scenes that are measured before and after; 0: those of the preset",
    )
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of torch; MLX computes on one core"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(repeats=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        sides = {"now": ROOT, options.before: exported(options.before, Path(root) / "before")}
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        turns = [
            (number, name)
            for number in range(1 if options.quick else options.repeats)
            for name in list(sides)[:: (-1) ** number]
        ]
        for number, name in measuring.track(turns, "runs"):
            runs[name].append(
                run(sides[name], Path(root) / f"{name}-{number}".replace("/", "-"), options)
            )
    rows = [row(name, summaries) for name, summaries in runs.items()]
    rows[1]["wall_ratio"] = rows[1]["seconds"] / rows[0]["seconds"]
    losses = [summaries[0]["losses"] for summaries in runs.values()]
    difference = max(abs(a - b) / abs(b) for a, b in zip(*losses, strict=True))
    now = runs["now"][0]
    about = {
        "backend": options.backend,
        "device": now["device"],
        "steps": len(losses[0]),
        "examples": now["examples"],
    }
    measuring.report(
        options,
        "default_run",
        rows,
        **about,
        largest_loss_difference=difference,
        versions=measuring.versions("mlx"),
    )


def exported(revision: str, folder: Path) -> Path:
    """Writes the sources of a commit into `folder`, and returns `folder`."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision], capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"--before {revision}: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(sources: Path, out: Path, options: Any) -> dict[str, Any]:
    """Runs once; returns the run's summary with the losses and the summed seconds of all steps."""
    settings = [f"run.seed={options.seed}", "run.checkpoint_every=0"]
    settings += [f"run.steps={options.steps}"] if options.steps else []
    settings += [f"measure.count={options.count}"] if options.count else []
    command = [
        sys.executable,
        "-m",
        "opd_cli",
        "train",
        "--backend",
        options.backend,
        "--out",
        str(out),
    ]
    command += [word for setting in settings for word in ("--set", setting)]
    path = os.pathsep.join(str(sources / folder) for folder in ("", "backends", "cli"))
    threads = {"OMP_NUM_THREADS": str(options.threads), "OPENBLAS_NUM_THREADS": "1"}
    environment = {**os.environ, **threads, "PYTHONPATH": path}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=sources, env=environment, check=False
    )
    if done.returncode:
        sys.exit(f"the run in {sources} failed:\n{done.stderr}")
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    parts = {
        name: sum(one[name] for one in steps) for name in steps[0] if name.startswith("seconds_")
    }
    return {
        **json.loads((out / "summary.json").read_text()),
        "losses": [one["loss"] for one in steps],
        **parts,
    }


def row(name: str, runs: list[dict[str, Any]]) -> measuring.Row:
    """Median seconds over the runs of a side, and the accuracies, which are equal in all runs."""
    times = ("seconds", "seconds_rollout", "seconds_accumulate", "seconds_apply")
    medians = {name: statistics.median(run[name] for run in runs) for name in times}
    accuracies = {
        f"{what} {when}": runs[0][when][f"{what}_accuracy"]
        for when in ("before", "after")
        for what in ("full", "crop")
    }
    return {"side": name, **medians, **accuracies, "gap_closed": runs[0]["gap_closed"]}


if __name__ == "__main__":
    main()
