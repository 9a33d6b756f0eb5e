"""Does the gap close for the reason that the method gives? Controls on the embedded model.

    python -m benchmarks.tiny_controls [--seeds 3] [--steps N] [--workers 2] [--json]

Each control runs on three seeds and differs from the preset `tiny` in the settings of CONTROLS.
Accuracy on the crop is always measured on the right crop. The benchmark writes
results/tiny_controls.json and results/tiny_controls.png, and skips runs that the file holds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tiny_runs import compare
from opd.run import recipe as recipes

BLUE, GREY = "#0b6e99", "#7a7a7a"

RATE = recipes.load("tiny").optimizer.learning_rate

CONTROLS: dict[str, list[str]] = {
    "crop teacher": ["measure.every=25"],
    "frozen teacher": ["teacher.rule=frozen"],
    "teacher sees the full image": ["view.kind=full"],
    "teacher sees a wrong crop": ["view.kind=wrong"],
    "learning rate / 3": [f"optimizer.learning_rate={RATE / 3}"],
    "learning rate x 3": [f"optimizer.learning_rate={RATE * 3}"],
    "supervised on the labels": [],
}


def main() -> None:
    compare("benchmarks.tiny_controls", __doc__, CONTROLS, picture, on_labels)


def on_labels(name: str, trainer: Any) -> None:
    """Puts the backend that trains on labels into the trainer of the supervised control."""
    if name.startswith("supervised"):
        trainer.backend = supervised(trainer)


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


if __name__ == "__main__":
    main()
