"""How do time and memory of the training stage grow with n, P, R and V, and does a term grow faster than the work that is needed?

    python -m benchmarks.growth [--backend torch|mlx] [--json] [--quick] [--plot FILE]

One size at a time is doubled, the others standing at P 256, R 32, n 4, V 4096. `seconds` are of one call of `accumulate` with one group:
the least of all turns, in which all sizes take part (who else uses the machine adds to a time, and a slow minute then meets every size).
`bytes` are the peak above what was resident; `needed` are the FLOPs and `functions` the exponentials and the like of `arithmetic.py`.
`predicted` are needed * a + functions * b seconds, where a and b, at least 0, are fitted once to all points of all axes: least squares of
the relative error. `fit` gives 1 / a (gflops, of products alone; null where a is 0), b (function_ns), and of all points the largest
|seconds / predicted - 1| (deviation).
`time_growth` is the growth of seconds over that of predicted since the size before: above 1 where time grows faster than these two kinds
of work. What grows as one of them does is in a or b and does not show: judge those by what a product and an exponential take elsewhere.
`byte_growth` is the growth in bytes over that of the size: at most 1 where memory is linear or better. `worst` are the largest of both
along each axis.
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
AXES = {"n": (1, 2, 4, 8, 16), "P": (128, 256, 512, 1024, 2048), "R": (16, 32, 64, 128, 256), "V": (4096, 8192, 16384, 32768, 65536)}
FIELDS = {"n": "n", "P": "prompt", "R": "completion"}
SIZES = {**against_rows.QUICK_SIZES, "hidden": 256, "layers": 4, "heads": 4, "head_dim": 64, "mlp": 768, "positions": 1024}


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--plot", type=Path, help="also write a picture of the growth")
    options = parser.parse_args()
    if options.plot and options.no_wall:
        parser.error("--plot shows times, which --no-wall leaves out")
    points = [(axis, size) for axis, sizes in AXES.items() for size in (sizes[:2] if options.quick else sizes)]
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
    worst = {axis: {name: max(row[name] for row in rows if row["axis"] == axis and name in row) for name in names} for axis in AXES}
    about: dict[str, Any] = {"device": measuring.device_name(), "backend": options.backend, "start": f"{START}, V {VOCABULARY}", **fit}
    shown = {axis: " / ".join(measuring.show(value) for value in one.values()) for axis, one in worst.items()}
    about["worst"] = worst if options.json else shown
    measuring.report(options, "growth", rows, **about, versions=measuring.versions("mlx", "mlx-vlm"))
    if options.plot:
        picture(rows, options.plot)


def measured(axis: str, size: int, options: Namespace, folder: Path) -> tuple[measuring.Row, Callable[[], Any]]:
    """Bytes of one call of `accumulate` with one size changed, the FLOPs and functions that it needs; and the call."""
    import transformers

    shape = shape_of(axis, size)
    path = workload.folder(folder, size if axis == "V" else VOCABULARY, **SIZES)
    config = transformers.AutoConfig.from_pretrained(path)
    sides, _ = (against_rows.of_torch if options.backend == "torch" else against_rows.of_mlx)(path, workload.group(config, shape))
    run = sides["group"]
    run()
    found: measuring.Row = {"needed": arithmetic.group(config, shape), "functions": arithmetic.functions(config, shape)}
    found["bytes"] = measuring.peak_bytes(run, "cpu" if options.backend == "torch" else "mlx")
    return found, run


def timed(rows: Sequence[measuring.Row], runs: Mapping[Any, Callable[[], Any]], options: Namespace) -> None:
    """Gives every row the seconds of its run, of `runs` by axis and size, and its rate."""
    times = measuring.interleaved(runs, 1 if options.quick else options.repeats, what="turns")
    for row in rows:
        row["seconds"] = min(times[row["axis"], row["size"]])
        row["gflops"] = row["needed"] / row["seconds"] / 1e9


def shape_of(axis: str, size: int) -> Shape:
    """The start with one size changed; V is the model's."""
    return START if axis == "V" else replace(START, **{FIELDS[axis]: size})


def predict(rows: Sequence[measuring.Row]) -> dict[str, float | None]:
    """Gives every row the seconds `predicted` by the costs that fit all of them; returns these, and how far off the worst row is."""
    flop, function = (float(cost) for cost in costs(rows))
    for row in rows:
        row["predicted"] = row["needed"] * flop + row["functions"] * function
    deviation = max(abs(row["seconds"] / row["predicted"] - 1) for row in rows)
    return {"gflops": 1e-9 / flop if flop else None, "function_ns": 1e9 * function, "deviation": deviation}


def costs(rows: Sequence[measuring.Row]) -> NDArray[np.float64]:
    """Seconds a FLOP and seconds a function [2]: neither is below 0, and the squares of predicted / seconds - 1 are least."""
    work = np.array([[row["needed"] / row["seconds"], row["functions"] / row["seconds"]] for row in rows])
    found: NDArray[np.float64] = np.linalg.lstsq(work, np.ones(len(rows)))[0]
    if found.min() < 0:  # then the best without negative costs has a zero in its place
        kept = found > 0
        found = np.zeros(2)
        found[kept] = np.linalg.lstsq(work[:, kept], np.ones(len(rows)))[0]
    return found


def growth(before: measuring.Row, after: measuring.Row) -> measuring.Row:
    """How much more time and memory grew than predicted seconds and size."""
    found = {"byte_growth": (after["bytes"] / before["bytes"]) / (after["size"] / before["size"])}
    if "seconds" in after:
        found["time_growth"] = (after["seconds"] / before["seconds"]) / (after["predicted"] / before["predicted"])
    return found


def picture(rows: list[measuring.Row], path: Path) -> None:
    """One column a size: time over the line of what is predicted; and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(AXES), figsize=(3.1 * len(AXES), 5), layout="constrained", sharex="col")
    for (above, below), axis in zip(panels.T, AXES, strict=True):
        curve = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in curve]
        above.plot(sizes, [row["predicted"] for row in curve], color="#7a7a7a", lw=1.5, label="products and functions")
        above.plot(sizes, [row["seconds"] for row in curve], "o", color="#0b6e99", ms=5, label="measured")
        below.plot(sizes, [row["bytes"] / 2**20 for row in curve], "o-", color="#0b6e99", ms=5, lw=1)
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
