"""What should the teacher see? Views and mixtures beside plain crops, on the embedded model.

    python -m benchmarks.views [--seeds 3] [--steps N] [--workers 2] [--only NAME] [--json]

All runs take the same steps of the preset `tiny`, on three seeds, and differ in the settings of
VIEWS. Accuracy on the crop is always measured on the right crop. The benchmark writes
results/views.json and results/views.png, and skips runs that the file holds. A larger view takes
longer: seconds are those of whole runs on one thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tiny_runs import compare

BLUE, GREY = "#0b6e99", "#7a7a7a"

VIEWS: dict[str, list[str]] = {
    "crop": [],
    "context": ["view.kind=context"],
    "several: full, crop": ["view.kind=several"],
    "several: full, context, crop": [
        "view.kind=several",
        'view.pieces=["full", "context", "crop"]',
    ],
    "marked": ["view.kind=marked"],
    "degrade": ["view.kind=degrade"],
    "mixture: crop 0.7, context 0.3": ["view.mixture={crop = 0.7, context = 0.3}"],
    "mixture: crop 0.5, degrade 0.5": ["view.mixture={crop = 0.5, degrade = 0.5}"],
    "full": ["view.kind=full"],
    "wrong": ["view.kind=wrong"],
}


def main() -> None:
    compare("benchmarks.views", __doc__, VIEWS, picture)


def picture(runs: dict[str, Any], path: Path) -> None:
    """Plots how much of the gap each view closes, and the accuracy on the crop that is kept: one
    dot for each seed, with its 95 % interval."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = [name for name in VIEWS if name in runs]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 0.8 + 0.42 * len(names)), layout="constrained", sharey=True
    )
    for place, name in enumerate(reversed(names)):
        seeds = list(runs[name].values())
        for offset, run in zip(np.linspace(0.2, -0.2, len(seeds)), seeds, strict=True):
            height = place + offset
            left.plot(run["gap_closed_interval"], [height] * 2, color=BLUE, lw=1.2, alpha=0.6)
            left.plot(run["gap_closed"], height, "o", color=BLUE, ms=5)
            low, high = (100 * bound for bound in run["after"]["crop_accuracy_interval"])
            right.plot([low, high], [height] * 2, color=GREY, lw=1.2, alpha=0.6)
            right.plot(100 * run["after"]["crop_accuracy"], height, "o", color=GREY, ms=5)
    left.axvline(0, color=GREY, lw=0.8)
    left.set_yticks(range(len(names)), reversed(names))
    left.set(xlabel="share of the gap that is closed", title="What the student learns")
    right.set(xlabel="accuracy on the crop after training, %", title="What it keeps")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
