"""How near are our FLOPs to the least a group needs, at the shapes of real models, and how do they grow with n, P, R and V?

    python -m benchmarks.real_shapes [--model qwen3-vl-4b] [--json] [--quick] [--plot FILE]

The training stage of one group (teacher forward, student forward and backward with layers computed again, head) on torch's meta device:
our own code runs, without data. Against it: n separate rows through our own code, and the arithmetic of `arithmetic.py`.
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
SHAPES = [Shape(p, r, n, crop=max(256, p // 4)) for p in (512, 2048, 4096, 8192) for r in (128, 512, 1024) for n in (1, 8, 16)]
QUICK = [Shape(512, 128, 8, crop=256)]


def counted(backend: Any, groups: list[Any], again: bool) -> int:
    """FLOPs of one `accumulate`; on the meta device there are no statistics to read, and no size decides what is computed again."""
    own = len(groups[0].completions[0])
    workload.on_device(backend, checkpoint_above=-1 if again else 2**62)
    # Autocast does not know the meta device; precision changes no count.
    plain = mock.patch.object(torch, "autocast", side_effect=lambda *_, **__: nullcontext())
    unread = mock.patch.object(HeadResult, "records", lambda _, groups: [[None] * len(group.completions) for group in groups])
    with plain, unread:
        found = measuring.flops(lambda: backend.accumulate(groups, FULL), own)
    backend._gradient = {}
    return found


def measured(config: Any, backend: Any, shape: Shape, again: bool = True) -> measuring.Row:
    """One row of the table; all n separate rows cost the same, so one is counted."""
    group = workload.group(config, shape)
    ours = counted(backend, [group], again)
    separate = shape.n * counted(backend, workload.rows_of(group)[:1], again)
    least = arithmetic.group(config, shape, again)
    return {
        "shape": str(shape), "flops": ours, "rows_flops": separate, "least": least,
        **measuring.ratios({"flops": ours}, {"flops": separate}, least),
    }  # fmt: skip


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--model", choices=workload.CONFIGS, default="qwen3-vl-4b")
    parser.add_argument("--plot", type=Path, help="also write a picture of the growth")
    options = parser.parse_args()
    config = workload.CONFIGS[options.model]()
    backend = workload.backend(workload.model(config, "meta"))
    rows = [measured(config, backend, shape) for shape in measuring.track(QUICK if options.quick else SHAPES, "shapes")]
    growth = {} if options.quick else grown(options.model)
    about = {"device": "meta (counts, no data)", "model": options.model, "versions": measuring.versions(), "growth": growth}
    if not options.json:
        about["growth"] = {axis: " ".join(f"{x}:{measuring.show(y)}" for x, y, _ in curve) for axis, curve in growth.items()}
    measuring.report(options, "real_shapes", rows, **about)
    if options.plot and growth:
        picture(growth, options.plot)


def grown(name: str) -> dict[str, list[tuple[int, int, int]]]:
    """FLOPs along one size at a time from P 2048, R 256, n 8 and the model's V: size, ours, least."""
    config = workload.CONFIGS[name]()
    backend = workload.backend(workload.model(config, "meta"))
    middle = Shape(2048, 256, 8)
    axes = {
        "n": [Shape(2048, 256, n) for n in (1, 2, 4, 8, 16)],
        "P": [Shape(p, 256, 8) for p in (512, 1024, 2048, 4096, 8192)],
        "R": [Shape(2048, r, 8) for r in (128, 256, 512, 1024)],
    }
    found = {}
    for axis, shapes in axes.items():
        sizes = [{"n": shape.n, "P": shape.prompt, "R": shape.completion}[axis] for shape in shapes]
        ours = [counted(backend, [workload.group(config, shape)], True) for shape in shapes]
        found[axis] = list(zip(sizes, ours, [arithmetic.group(config, shape, True) for shape in shapes], strict=True))
    if name == "qwen3-vl-4b":
        found["V"] = []
        for vocabulary in (155_000, 200_000, 300_000):  # above the ids of image tokens
            config = workload.qwen3_vl_4b(vocab_size=vocabulary)
            backend = workload.backend(workload.model(config, "meta"))
            ours = counted(backend, [workload.group(config, middle)], True)
            found["V"].append((vocabulary, ours, arithmetic.group(config, middle, True)))
    return found


def picture(growth: dict[str, list[tuple[int, int, int]]], path: Path) -> None:
    """One panel a size: dots are counted, the line is the arithmetic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(growth), figsize=(3.2 * len(growth), 3), layout="constrained")
    for axes, (axis, curve) in zip(panels, growth.items(), strict=True):
        sizes, ours, least = zip(*curve, strict=True)
        axes.plot(sizes, [value / 1e12 for value in least], color="#7a7a7a", lw=1.5, label="least")
        axes.plot(sizes, [value / 1e12 for value in ours], "o", color="#0b6e99", ms=5, label="ours", clip_on=False)
        axes.set(xlabel=axis, ylim=(0, None), xlim=(0, None) if axis != "V" else None)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("TFLOP a group")
    panels[0].legend(frameon=False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
