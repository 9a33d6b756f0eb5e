"""How do time and memory of the training stage grow with n, P, R and V, and does a term grow faster than the arithmetic says?

    python -m benchmarks.growth [--backend torch|mlx] [--json] [--quick] [--plot FILE]

One size at a time is doubled from P 256, R 32, n 4, V 4096. `seconds` are medians, `bytes` the peak above what was resident; `needed` are
the FLOPs of `arithmetic.py`. `time_growth` is the time's growth over that of the FLOPs since the size before: above 1 where time grows
faster than the arithmetic. `byte_growth` is the growth in bytes over that of the size: at most 1 where memory is linear or better.
`worst` are the largest of both along each axis.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    points = [(axis, size) for axis, sizes in AXES.items() for size in (sizes[:2] if options.quick else sizes)]
    rows: list[measuring.Row] = []
    for axis, size in measuring.track(points, "sizes"):
        rows.append({"axis": axis, "size": size, **measured(axis, size, options)})
        if len(rows) > 1 and rows[-2]["axis"] == axis:
            rows[-1] |= growth(*rows[-2:])
    names = ("time_growth", "byte_growth") if not options.no_wall else ("byte_growth",)
    worst = {axis: {name: max(row[name] for row in rows if row["axis"] == axis and name in row) for name in names} for axis in AXES}
    about: dict[str, Any] = {"device": measuring.device_name(), "backend": options.backend, "start": f"{START}, V {VOCABULARY}"}
    shown = {axis: " / ".join(measuring.show(value) for value in one.values()) for axis, one in worst.items()}
    about["worst"] = worst if options.json else shown
    measuring.report(options, "growth", rows, **about, versions=measuring.versions("mlx", "mlx-vlm"))
    if options.plot:
        picture(rows, options.plot)


def measured(axis: str, size: int, options: Namespace) -> measuring.Row:
    """Seconds and bytes of one call of `accumulate` with one size changed, and the FLOPs that it needs."""
    import transformers

    shape = START if axis == "V" else replace(START, **{FIELDS[axis]: size})
    with tempfile.TemporaryDirectory() as root:
        path = workload.folder(Path(root) / "model", size if axis == "V" else VOCABULARY, **SIZES)
        config = transformers.AutoConfig.from_pretrained(path)
        sides, _ = (against_rows.of_torch if options.backend == "torch" else against_rows.of_mlx)(path, workload.group(config, shape))
        device = "cpu" if options.backend == "torch" else "mlx"
        run = sides["group"]
        run()
        found: measuring.Row = {"needed": arithmetic.group(config, shape), "bytes": measuring.peak_bytes(run, device)}
        if not options.no_wall:
            found["seconds"] = measuring.seconds({"group": run}, 1 if options.quick else options.repeats, device)["group"]
            found["gflops"] = found["needed"] / found["seconds"] / 1e9
        return found


def growth(before: measuring.Row, after: measuring.Row) -> measuring.Row:
    """How much more time and memory grew than FLOPs and size."""
    found = {"byte_growth": (after["bytes"] / before["bytes"]) / (after["size"] / before["size"])}
    if "seconds" in after:
        found["time_growth"] = (after["seconds"] / before["seconds"]) / (after["needed"] / before["needed"])
    return found


def picture(rows: list[measuring.Row], path: Path) -> None:
    """One column a size: time over the line of the arithmetic, at the rate of the largest; and memory."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(2, len(AXES), figsize=(3.1 * len(AXES), 5), layout="constrained", sharex="col")
    for (above, below), axis in zip(panels.T, AXES, strict=True):
        curve = [row for row in rows if row["axis"] == axis]
        sizes = [row["size"] for row in curve]
        rate = curve[-1]["seconds"] / curve[-1]["needed"]
        above.plot(sizes, [row["needed"] * rate for row in curve], color="#7a7a7a", lw=1.5, label="arithmetic, at the rate of the largest")
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
