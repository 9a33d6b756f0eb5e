"""What should the teacher see? Views and mixtures beside plain crops, on the embedded model.

    python -m benchmarks.views [--seeds 3] [--steps N] [--workers 2] [--only NAME] [--json]

All runs take the same steps of the preset `tiny`, on three seeds, and differ in the settings of
VIEWS. Accuracy on the crop is always measured on the right crop. The benchmark writes
results/views.json and results/views.png, and skips runs that the file holds. A larger view takes
longer: seconds are those of whole runs on one thread.

Located boxes are those of `opd data locate tiny`, which takes 23 minutes; the benchmark keeps them
in the user's cache folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks.tiny_runs import compare
from opd.paths import cache_folder
from opd.progress import Quiet
from opd.run import recipe as recipes
from opd.run.locating import locate_rows

BLUE, GREY = "#0b6e99", "#7a7a7a"

LOCATED = cache_folder() / "benchmarks" / "attention.jsonl"
"""The rows of the preset's data with boxes by attention."""

SURE = LOCATED.with_name("attention-sure.jsonl")
"""Those above the median confidence."""


def of(data: Path) -> list[str]:
    """The settings of a run on other data, measured as the others are."""
    return [f"data.path={json.dumps(str(data))}", "measure.path=tiny"]


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
    "boxes by attention": of(LOCATED),
    "boxes by attention, the surer half": of(SURE),
    "full": ["view.kind=full"],
    "wrong": ["view.kind=wrong"],
}


def main() -> None:
    compare("benchmarks.views", __doc__, VIEWS, picture, before=locate)


def locate(name: str) -> None:
    """Writes the data of a run on located boxes, going on with what an earlier call left."""
    if "attention" not in name or SURE.exists():
        return
    locate_rows(recipes.load("tiny"), "cpu", "attention", LOCATED, None, Quiet())
    lines = [line for line in LOCATED.read_text().splitlines() if "boxes" in json.loads(line)]
    sure = [json.loads(line)["located"]["confidence"] for line in lines]
    middle = median(sure)
    kept = [line for line, one in zip(lines, sure, strict=True) if one >= middle]
    SURE.write_text("\n".join(kept) + "\n")


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
