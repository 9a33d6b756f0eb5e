"""Do time and memory of the training stage grow faster with n, P, R and V than the needed work?

    python -m benchmarks.growth [--backend torch|mlx] [--json] [--quick] [--plot FILE]

The benchmark doubles one size at a time from P 256, R 32, n 4, V 4096, and measures one call of
`accumulate` with one group.
  seconds      the smallest of all turns; every turn runs all sizes, because other users of the
               machine only ever add time, and a slow minute should meet every size
  bytes        the peak above the resident state
  needed       FLOPs, as `arithmetic` counts them
  functions    exponentials and the like, as `arithmetic` counts them
  predicted    needed * a + functions * b, in seconds; a >= 0 and b >= 0 are fitted once to all
               points of all axes, by least squares of the relative error
  fit          1 / a (gflops, of products alone; null where a is 0), b (function_ns), and the
               largest |seconds / predicted - 1| (deviation)
  time_growth  the growth of seconds over the growth of predicted, since the size before; it is
               above 1 where time grows faster than both kinds of work
  byte_growth  the growth of bytes over the growth of the size; it is at most 1 where memory is
               linear or better
  worst        the largest time_growth and byte_growth along each axis
A cost that grows in proportion to FLOPs or to functions is absorbed by a or b and does not show in
time_growth: compare a and b with the cost of a product and an exponential elsewhere.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks import against_rows, arithmetic, measuring, workload
from benchmarks.workload import Shape

START = Shape(256, 32, 4)
VOCABULARY = 4096
AXES = {
    "n": (1, 2, 4, 8, 16),
    "P": (128, 256, 512, 1024, 2048),
    "R": (16, 32, 64, 128, 256),
    "V": (4096, 8192, 16384, 32768, 65536),
}
FIELDS = {"n": "n", "P": "prompt", "R": "completion"}
SIZES = {
    **against_rows.QUICK_SIZES,
    "hidden": 256,
    "layers": 4,
    "heads": 4,
    "head_dim": 64,
    "mlp": 768,
    "positions": 1024,
}


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--plot", type=Path, help="also write a picture of the growth")
    options = parser.parse_args()
    if options.plot and options.no_wall:
        parser.error("--plot shows times, which --no-wall leaves out")
    points = [
        (axis, size)
        for axis, sizes in AXES.items()
        for size in (sizes[:2] if options.quick else sizes)
    ]
    rows, runs = [], {}
    with tempfile.TemporaryDirectory() as root:
        for axis, size in measuring.track(points, "sizes"):
            row, runs[axis, size] = measured(axis, size, options, Path(root) / f"{axis}{size}")
            rows.append({"axis": axis, "size": size, **row})
        if not options.no_wall:
            timed(rows, runs, options)
    fit = {} if options.no_wall else {"fit": predict(rows)}
    for before, after in pairwise(rows):
        if before["axis"] == after["axis"]:
            after |= growth(before, after)
    names = ("time_growth", "byte_growth") if not options.no_wall else ("byte_growth",)
    worst = {
        axis: {
            name: max(row[name] for row in rows if row["axis"] == axis and name in row)
            for name in names
        }
        for axis in AXES
    }
    about: dict[str, Any] = {
        "device": measuring.device_name(),
        "backend": options.backend,
        "start": f"{START}, V {VOCABULARY}",
        **fit,
    }
    shown = {
        axis: " / ".join(measuring.show(value) for value in ratios.values())
        for axis, ratios in worst.items()
    }
    about["worst"] = worst if options.json else shown
    measuring.report(
        options, "growth", rows, **about, versions=measuring.versions("mlx", "mlx-vlm")
    )
    if options.plot:
        picture(rows, options.plot)


def measured(
    axis: str, size: int, options: Namespace, folder: Path
) -> tuple[measuring.Row, Callable[[], Any]]:
    """Measures one call of `accumulate` with one size changed.

    Returns the peak bytes with the FLOPs and functions that the call needs, and the call itself.
    """
    import transformers

    shape = shape_of(axis, size)
    path = workload.folder(folder, size if axis == "V" else VOCABULARY, **SIZES)
    config = transformers.AutoConfig.from_pretrained(path)
    sides, _ = (against_rows.of_torch if options.backend == "torch" else against_rows.of_mlx)(
        path, workload.group(config, shape)
    )
    run = sides["group"]
    run()
    row: measuring.Row = {
        "needed": arithmetic.group(config, shape),
        "functions": arithmetic.functions(config, shape),
    }
    row["bytes"] = measuring.peak_bytes(run, "cpu" if options.backend == "torch" else "mlx")
    return row, run


def timed(
    rows: Sequence[measuring.Row], runs: Mapping[Any, Callable[[], Any]], options: Namespace
) -> None:
    """Times `runs`, keyed by axis and size, and sets seconds and gflops in the row of each."""
    times = measuring.interleaved(runs, 1 if options.quick else options.repeats, what="turns")
    for row in rows:
        row["seconds"] = min(times[row["axis"], row["size"]])
        row["gflops"] = row["needed"] / row["seconds"] / 1e9


def shape_of(axis: str, size: int) -> Shape:
    """START with one size changed; V is a size of the model, so it leaves the shape as it is."""
    return START if axis == "V" else replace(START, **{FIELDS[axis]: size})


def predict(rows: Sequence[measuring.Row]) -> dict[str, float | None]:
    """Fits the two costs to all rows, sets `predicted` seconds in every row, and returns the costs
    and the largest relative deviation."""
    flop, function = (float(cost) for cost in costs(rows))
    for row in rows:
        row["predicted"] = row["needed"] * flop + row["functions"] * function
    deviation = max(abs(row["seconds"] / row["predicted"] - 1) for row in rows)
    return {
        "gflops": 1e-9 / flop if flop else None,
        "function_ns": 1e9 * function,
        "deviation": deviation,
    }


def costs(rows: Sequence[measuring.Row]) -> NDArray[np.float64]:
    """Seconds per FLOP and per function [2], both at least 0, that minimise the sum of
    (predicted / seconds - 1)^2."""
    work = np.array(
        [[row["needed"] / row["seconds"], row["functions"] / row["seconds"]] for row in rows]
    )
    fitted: NDArray[np.float64] = np.linalg.lstsq(work, np.ones(len(rows)))[0]
    if fitted.min() < 0:  # the best nonnegative fit then has 0 in place of the negative cost
        positive = fitted > 0
        fitted = np.zeros(2)
        fitted[positive] = np.linalg.lstsq(work[:, positive], np.ones(len(rows)))[0]
    return fitted


def growth(before: measuring.Row, after: measuring.Row) -> measuring.Row:
    """The growth of time over that of predicted seconds, and of bytes over that of the size."""
    ratios = {"byte_growth": (after["bytes"] / before["bytes"]) / (after["size"] / before["size"])}
    if "seconds" in after:
        ratios["time_growth"] = (after["seconds"] / before["seconds"]) / (
            after["predicted"] / before["predicted"]
        )
    return ratios


def picture(rows: list[measuring.Row], path: Path) -> None:
    """Plots a column for each size: measured and predicted time above, memory below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        2, len(AXES), figsize=(3.1 * len(AXES), 5), layout="constrained", sharex="col"
    )
    for (above, below), axis in zip(panels.T, AXES, strict=True):
        curve = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in curve]
        above.plot(
            sizes,
            [row["predicted"] for row in curve],
            color="#7a7a7a",
            lw=1.5,
            label="products and functions",
        )
        above.plot(
            sizes, [row["seconds"] for row in curve], "o", color="#0b6e99", ms=5, label="measured"
        )
        below.plot(
            sizes, [row["bytes"] / 2**20 for row in curve], "o-", color="#0b6e99", ms=5, lw=1
        )
        below.set(xlabel=axis, xlim=(0, None), ylim=(0, None))
        above.set(ylim=(0, None))
        for panel in (above, below):
            panel.spines[["top", "right"]].set_visible(False)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("peak, MiB")
    panels[0, 0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
