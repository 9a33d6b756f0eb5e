"""Does the gap close for the reason that the method gives? Controls on the embedded model.

    python -m benchmarks.tiny_controls [--seeds 3] [--steps N] [--workers 2] [--json]

Each control runs on three seeds and differs from the preset `tiny` in the settings of CONTROLS.
Accuracy on the crop is always measured on the right crop. The benchmark writes
results/tiny_controls.json and results/tiny_controls.png, and skips runs that the file holds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
BLUE, GREY = "#0b6e99", "#7a7a7a"

CONTROLS: dict[str, list[str]] = {
    "crop teacher": [],
    "frozen teacher": ["teacher.rule=frozen"],
    "teacher sees the full image": ["view.kind=full"],
    "teacher sees a wrong crop": ["view.kind=wrong"],
    "learning rate / 3": ["optimizer.learning_rate={small}"],
    "learning rate x 3": ["optimizer.learning_rate={large}"],
    "supervised on the labels": [],
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0: those of the preset")
    parser.add_argument(
        "--workers", type=int, default=2, help="runs side by side, of one thread each"
    )
    parser.add_argument("--only", help="one control")
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--one", nargs=2, metavar=("CONTROL", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one[0], int(arguments.one[1]), arguments.steps)))
        return
    path = RESULTS / (
        "tiny_controls.json" if not arguments.steps else f"tiny_controls_{arguments.steps}.json"
    )
    earlier = json.loads(path.read_text()) if path.exists() else {"runs": {}, "dates": {}}
    stored, dates = earlier["runs"], earlier["dates"]
    jobs = [
        (name, seed)
        for seed in range(arguments.seeds)
        for name in CONTROLS
        if arguments.only in (None, name)
    ]
    jobs = [(name, seed) for name, seed in jobs if str(seed) not in stored.get(name, {})]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for (name, seed), summary in zip(
            jobs, pool.map(lambda job: in_new_process(*job, arguments.steps), jobs), strict=True
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
    rows = {name: table_row(runs) for name, runs in stored.items()}
    if arguments.json:
        print(json.dumps(rows))
    else:
        show(rows)
    picture(stored, path.with_suffix(".png"))


def in_new_process(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Runs one control with one seed in a new process, on one thread."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.tiny_controls",
        "--one",
        name,
        str(seed),
        "--steps",
        str(steps),
    ]
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


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """Runs one control; returns the run's summary and the curve of both accuracies."""
    from opd.run import recipe as recipes
    from opd.run.session import start

    rate = recipes.load("tiny").optimizer.learning_rate
    options = [option.format(small=rate / 3, large=rate * 3) for option in CONTROLS[name]]
    options += [
        f"run.seed={seed}",
        "run.checkpoint_every=0",
        f"measure.every={25 if name == 'crop teacher' else 100}",
    ]
    options += [f"run.steps={steps}"] if steps else []
    with tempfile.TemporaryDirectory() as folder:
        trainer = start(recipes.load("tiny", options), "cpu", Path(folder) / "run")
        if name.startswith("supervised"):
            trainer.backend = supervised(trainer)
        summary = trainer.train()
        curve = [
            [row[key] for key in ("step", "full_accuracy", "crop_accuracy")]
            for row in trainer.folder.rows("accuracy.jsonl")
        ]
        return {**summary, "curve": curve}


def supervised(trainer: Any) -> Any:
    """A backend that trains on labels, which the method does not need: sampled completions are the
    labels, and the loss is the labels' cross-entropy."""
    import torch

    from opd import randomness
    from opd.types import Completion, ModelOptions
    from opd_torch.backend import TorchBackend
    from opd_torch.batch import lay_out
    from opd_torch.device import this_device
    from opd_torch.forward import hidden_states
    from opd_torch.model import load_model

    encoder = trainer.encoder
    stop = encoder.stop[0]
    labels, recipe = {}, trainer.recipe
    seed, prompts, count = recipe.run.seed, recipe.rollout.prompts, len(trainer.examples)
    steps = range(1, recipe.run.steps + 1)
    # The rows of the run's steps alone: to encode all takes most of a minute.
    rows = {int(row) for step in steps for row in randomness.batch(seed, step, prompts, count)}
    for row in sorted(rows):
        example = trainer.examples[row]
        prompt = encoder.encode(list(example.images), example.question)
        tokens = np.array(
            [*encoder._tokenizer(example.answer, add_special_tokens=False)["input_ids"], stop],
            np.int32,
        )
        labels[prompt.key, prompt.tokens.tobytes()] = Completion(
            tokens, np.zeros(len(tokens), np.float32), finished=True
        )

    class Supervised(TorchBackend):
        def sample(
            self,
            prompts: Any,
            uniforms: Any,
            sampling: Any,
            policy: Any = "student",
            prefill: Any = None,
        ) -> Any:
            if sampling.temperature == 0:  # measuring
                return super().sample(prompts, uniforms, sampling, policy)
            return [[labels[prompt.key, prompt.tokens.tobytes()]] for prompt in prompts]

        def accumulate(
            self, groups: Any, objective: Any, split: int = 0, prefill: Any = None
        ) -> Any:
            tokens = torch.from_numpy(
                np.concatenate([one.tokens for group in groups for one in group.completions])
            ).long()
            weights = torch.from_numpy(
                np.concatenate([weight for group in groups for weight in group.weights])
            )
            completions = [[one.tokens for one in group.completions] for group in groups]
            hidden = hidden_states(
                self._student,
                lay_out([group.student for group in groups], completions, torch.device("cpu")),
            )
            losses = torch.nn.functional.cross_entropy(
                hidden @ self._student.head.T, tokens, reduction="none"
            )
            gradients = torch.autograd.grad(
                (weights * losses).sum(), list(self._student.parameters.values())
            )
            for name, value in zip(self._student.parameters, gradients, strict=True):
                self._gradient[name] = (
                    self._gradient[name] + value if name in self._gradient else value.contiguous()
                )
            return self.score(groups, objective)

    options = ModelOptions(trainer.recipe.model.folder())
    return Supervised(options, load_model(options, this_device("cpu")))


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


def picture(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Plots both accuracies over the default run's steps, and how much of the gap each control
    closes: one line or dot for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in CONTROLS if name in runs]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4), layout="constrained", gridspec_kw={"width_ratios": [1, 1.15]}
    )
    for run in runs[names[0]].values():
        steps, full, crop = np.array(run["curve"]).T
        left.plot(steps, 100 * crop, color=GREY, lw=1.5)
        left.plot(steps, 100 * full, color=BLUE, lw=1.5)
        left.fill_between(steps, 100 * full, 100 * crop, color=BLUE, alpha=0.07, lw=0)
    left.text(0.3 * steps[-1], 103, "evidence crop", color=GREY)
    left.text(
        0.3 * steps[-1],
        100 * np.interp(0.3 * steps[-1], steps, full) - 10,
        "full image",
        color=BLUE,
    )
    left.set(
        xlabel="step",
        ylabel="accuracy, % of 1,000 fresh scenes",
        ylim=(0, 109),
        xlim=(0, steps[-1]),
        title="The gap closes",
    )
    for place, name in enumerate(reversed(names)):
        seeds = list(runs[name].values())
        for offset, run in zip(np.linspace(0.2, -0.2, len(seeds)), seeds, strict=True):
            low, high = run["gap_closed_interval"]
            right.plot([low, high], [place + offset] * 2, color=BLUE, lw=1.2, alpha=0.6)
            right.plot(run["gap_closed"], place + offset, "o", color=BLUE, ms=5)
    right.axvline(0, color=GREY, lw=0.8)
    right.set_yticks(range(len(names)), reversed(names))
    right.set(
        xlabel="share of the gap that is closed, with 95 % interval",
        title="Only the evidence closes it",
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def versions() -> dict[str, str]:
    names: Sequence[str] = ("vision-opd", "torch", "transformers", "numpy", "pillow")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
