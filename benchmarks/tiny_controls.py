"""Does the gap close for the reason that the method gives? Controls on the embedded model, each on three seeds.

    python -m benchmarks.tiny_controls [--seeds 3] [--steps N] [--workers 2] [--json]

Each control differs from the preset `tiny` in what is named. The crop's accuracy is always measured on the right crop.
Writes results/tiny_controls.json and results/tiny_controls.png; runs that are there already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"

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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="0: those of the preset")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, of one thread each")
    parser.add_argument("--only", help="one control")
    parser.add_argument("--json", action="store_true", help="one object on one line")
    parser.add_argument("--one", nargs=2, metavar=("CONTROL", "SEED"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(run(arguments.one[0], int(arguments.one[1]), arguments.steps)))
        return
    path = RESULTS / ("tiny_controls.json" if not arguments.steps else f"tiny_controls_{arguments.steps}.json")
    stored: dict[str, Any] = json.loads(path.read_text())["runs"] if path.exists() else {}
    jobs = [(name, seed) for seed in range(arguments.seeds) for name in CONTROLS if arguments.only in (None, name)]
    jobs = [(name, seed) for name, seed in jobs if str(seed) not in stored.get(name, {})]
    with ThreadPoolExecutor(arguments.workers) as pool:
        for (name, seed), summary in zip(jobs, pool.map(lambda job: apart(*job, arguments.steps), jobs), strict=True):
            stored.setdefault(name, {})[str(seed)] = summary
            print(
                f"{name}, seed {seed}: {summary['before']['full_accuracy']:.3f} -> {summary['after']['full_accuracy']:.3f}", file=sys.stderr
            )
            result = {
                "date": str(date.today()),
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


def apart(name: str, seed: int, steps: int) -> dict[str, Any]:
    """One run in a process of its own, on one thread."""
    command = [sys.executable, "-m", "benchmarks.tiny_controls", "--one", name, str(seed), "--steps", str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, seed {seed} failed:\n{done.stderr}")
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def run(name: str, seed: int, steps: int) -> dict[str, Any]:
    """The summary of one run, and how its accuracies came."""
    from opd import recipe as recipes
    from opd import run as runs

    rate = recipes.load("tiny").optimizer.learning_rate
    options = [option.format(small=rate / 3, large=rate * 3) for option in CONTROLS[name]]
    options += [f"run.seed={seed}", "run.checkpoint_every=0", *([f"run.steps={steps}"] if steps else [])]
    with tempfile.TemporaryDirectory() as folder:
        trainer = runs.start(recipes.load("tiny", options), "cpu", Path(folder) / "run")
        if name.startswith("supervised"):
            trainer.backend = supervised(trainer)
        return trainer.train()


def supervised(trainer: Any) -> Any:
    """A backend whose completions are the labels and whose loss is their cross-entropy: what the method does without."""
    import torch

    from opd.types import Completion, ModelOptions
    from opd_torch.backend import TorchBackend

    encoder = trainer.encoder
    stop = encoder.stop[0]
    labels = {}
    for example in trainer.examples:
        prompt = encoder.encode(list(example.images), example.question)
        tokens = np.array([*encoder._tokenizer(example.answer, add_special_tokens=False)["input_ids"], stop], np.int32)
        labels[prompt.key, prompt.tokens.tobytes()] = Completion(tokens, np.zeros(len(tokens), np.float32), finished=True)

    class Supervised(TorchBackend):
        def sample(self, prompts: Any, uniforms: Any, sampling: Any, policy: Any = "student") -> Any:
            if sampling.temperature == 0:  # measuring
                return super().sample(prompts, uniforms, sampling, policy)
            return [[labels[prompt.key, prompt.tokens.tobytes()]] for prompt in prompts]

        def accumulate(self, groups: Any, objective: Any) -> Any:
            tokens = torch.from_numpy(np.concatenate([one.tokens for group in groups for one in group.completions])).long()
            weights = torch.from_numpy(np.concatenate([weight for group in groups for weight in group.weights]))
            hidden = self._hidden("student", groups, gradient=True)
            losses = torch.nn.functional.cross_entropy(hidden @ self._student.lm_head.weight.T, tokens, reduction="none")
            found = torch.autograd.grad((weights * losses).sum(), list(self._parameters.values()))
            for name, value in zip(self._parameters, found, strict=True):
                self._gradient[name] = self._gradient[name] + value if name in self._gradient else value
            return self.score(groups, objective)

    return Supervised(ModelOptions(trainer.recipe.model.folder()), torch.device("cpu"))


def table_row(runs: dict[str, Any]) -> dict[str, Any]:
    """Means over seeds."""

    def mean(*path: str) -> float:
        return float(np.mean([run[path[0]] if len(path) == 1 else run[path[0]][path[1]] for run in runs.values()]))

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
        full, crop = (f"{row[f'{view}_before']:.3f} -> {row[f'{view}_after']:.3f}" for view in ("full", "crop"))
        each = ", ".join(f"{value:.2f}" for value in row["gap_closed_each"])
        print(f"{name:30} {full:>16} {crop:>16} {row['gap_closed']:>11.2f}  {each}")


def picture(runs: dict[str, dict[str, Any]], path: Path) -> None:
    """Accuracy before and after of every seed, full image and crop."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in CONTROLS if name in runs]
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(names) + 1.4), layout="constrained")
    for place, name in enumerate(reversed(names)):
        for view, colour, offset in (("crop", "#8c8c8c", 0.18), ("full", "#0b6e99", -0.18)):
            for before, after in ends(runs[name].values(), f"{view}_accuracy"):
                axes.annotate(
                    "", (after, place + offset), (before, place + offset), arrowprops={"arrowstyle": "->", "color": colour, "lw": 1.6}
                )
    axes.set_yticks(range(len(names)), reversed(names))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("accuracy before → after, on 1,000 fresh scenes; one arrow a seed")
    for label, colour in (("full image", "#0b6e99"), ("evidence crop", "#8c8c8c")):
        axes.plot([], [], color=colour, label=label)
    axes.legend(loc="lower left", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=160)


def ends(runs: Any, key: str) -> Iterator[tuple[float, float]]:
    for run in runs:
        yield run["before"][key], run["after"][key]


def versions() -> dict[str, str]:
    names: Sequence[str] = ("vision-opd", "torch", "transformers", "numpy", "pillow")
    return {name: version(name) for name in names}


if __name__ == "__main__":
    main()
