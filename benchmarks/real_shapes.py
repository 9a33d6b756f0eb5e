"""How near are our FLOPs to the least at the shapes of real models, and how do they grow?

    python -m benchmarks.real_shapes [--model qwen3-vl-4b] [--json] [--quick] [--plot FILE]

The benchmark counts the FLOPs of a group's training stage: teacher forward, student forward and
backward with activation checkpointing, head. Our code runs on torch's meta device, without data.
It compares our code on n separate rows and the least by `arithmetic`, and counts how FLOPs grow
with n, P, R and V.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import arithmetic, measuring, workload
from benchmarks.workload import Shape
from opd.objective import Objective
from opd_torch.objective import HeadResult

FULL = Objective(alpha=0.5, top_k=None)
SHAPES = [
    Shape(p, r, n, crop=max(256, p // 4))
    for p in (512, 2048, 4096, 8192)
    for r in (128, 512, 1024)
    for n in (1, 8, 16)
]
QUICK = [Shape(512, 128, 8, crop=256)]


def counted(backend: Any, groups: list[Any], recompute: bool) -> int:
    """Counts the FLOPs of one `accumulate` on the meta device, which has no statistics to return.

    `recompute` turns checkpointing on or off for all layers.
    """
    length = len(groups[0].completions[0])
    workload.on_device(backend, checkpoint_above=-1 if recompute else 2**62)
    # Autocast does not support the meta device, and precision does not change a count.
    plain = mock.patch.object(torch, "autocast", side_effect=lambda *_, **__: nullcontext())
    unread = mock.patch.object(
        HeadResult,
        "records",
        lambda _, groups: [[None] * len(group.completions) for group in groups],
    )
    with plain, unread:
        flops = measuring.flops(lambda: backend.accumulate(groups, FULL), length)
    backend._gradient = {}
    return flops


def measured(config: Any, backend: Any, shape: Shape, recompute: bool = True) -> measuring.Row:
    """Counts one row of the table. The n separate rows cost the same, so only one is counted."""
    group = workload.group(config, shape)
    ours = counted(backend, [group], recompute)
    separate = shape.n * counted(backend, workload.rows_of(group)[:1], recompute)
    least = arithmetic.group(config, shape, recompute)
    return {
        "shape": str(shape),
        "flops": ours,
        "rows_flops": separate,
        "least": least,
        **measuring.ratios({"flops": ours}, {"flops": separate}, least),
    }


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--model", choices=workload.CONFIGS, default="qwen3-vl-4b")
    parser.add_argument("--plot", type=Path, help="also write a picture of the growth")
    options = parser.parse_args()
    config = workload.CONFIGS[options.model]()
    backend = workload.backend(workload.model(config, "meta"))
    rows = [
        measured(config, backend, shape)
        for shape in measuring.track(QUICK if options.quick else SHAPES, "shapes")
    ]
    growth = {} if options.quick else grown(options.model)
    about = {
        "device": "meta (counts, no data)",
        "model": options.model,
        "versions": measuring.versions(),
        "growth": growth,
    }
    if not options.json:
        about["growth"] = {
            axis: " ".join(f"{x}:{measuring.show(y)}" for x, y, _ in curve)
            for axis, curve in growth.items()
        }
    measuring.report(options, "real_shapes", rows, **about)
    if options.plot and growth:
        picture(growth, options.plot)


def grown(name: str) -> dict[str, list[tuple[int, int, int]]]:
    """FLOPs along one size at a time from P 2048, R 256, n 8: (size, ours, least) by axis.

    Only the widths of qwen3-vl-4b are measured along V.
    """
    config = workload.CONFIGS[name]()
    backend = workload.backend(workload.model(config, "meta"))
    middle = Shape(2048, 256, 8)
    axes = {
        "n": [Shape(2048, 256, n) for n in (1, 2, 4, 8, 16)],
        "P": [Shape(p, 256, 8) for p in (512, 1024, 2048, 4096, 8192)],
        "R": [Shape(2048, r, 8) for r in (128, 256, 512, 1024)],
    }
    curves = {}
    for axis, shapes in axes.items():
        sizes = [{"n": shape.n, "P": shape.prompt, "R": shape.completion}[axis] for shape in shapes]
        ours = [counted(backend, [workload.group(config, shape)], True) for shape in shapes]
        curves[axis] = list(
            zip(
                sizes,
                ours,
                [arithmetic.group(config, shape, True) for shape in shapes],
                strict=True,
            )
        )
    if name == "qwen3-vl-4b":
        curves["V"] = []
        for vocabulary in (155_000, 200_000, 300_000):  # above the ids of image tokens
            config = workload.qwen3_vl_4b(vocab_size=vocabulary)
            backend = workload.backend(workload.model(config, "meta"))
            ours = counted(backend, [workload.group(config, middle)], True)
            curves["V"].append((vocabulary, ours, arithmetic.group(config, middle, True)))
    return curves


def picture(growth: dict[str, list[tuple[int, int, int]]], path: Path) -> None:
    """Plots a panel for each size: dots for counted FLOPs, a line for the least."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(
        1, len(growth), figsize=(3.2 * len(growth), 3), layout="constrained"
    )
    for axes, (axis, curve) in zip(panels, growth.items(), strict=True):
        sizes, ours, least = zip(*curve, strict=True)
        axes.plot(sizes, [value / 1e12 for value in least], color="#7a7a7a", lw=1.5, label="least")
        axes.plot(
            sizes,
            [value / 1e12 for value in ours],
            "o",
            color="#0b6e99",
            ms=5,
            label="ours",
            clip_on=False,
        )
        axes.set(xlabel=axis, ylim=(0, None), xlim=(0, None) if axis != "V" else None)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("TFLOP a group")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
