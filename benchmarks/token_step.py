"""What does a token step on MLX cost the host, with a graph built per step and with a compiled one?

    python -m benchmarks.token_step [--layers 28 --n 8 --tokens 48] [--json] [--quick]

Both sides run a rollout of a model with many narrow layers on the same random numbers, and must
sample equal tokens.
  build ms     the host's time to build the graph of a step: the median of all steps
  most ms      the host's time for the slowest step, which traces a new shape
  operations   the operations of the graph, without views: on a GPU each is a kernel
  ms a token   the wall time of a token, with the device's work
On a CPU `ms a token` does not show what a GPU would take: the operations themselves dominate, and
MLX compiles kernels in the run that is not timed.
"""

from __future__ import annotations

import io
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks import measuring, workload
from opd.types import Completion, ModelOptions, Sampling

SIDES = {"one by one": False, "compiled, one ahead": True}

NARROW = {
    "hidden": 64,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "mlp": 128,
    "vision_hidden": 64,
    "vision_layers": 3,
    "vision_heads": 4,
    "vision_mlp": 128,
    "positions": 256,
}

VIEWS = {
    "AsStrided",
    "Broadcast",
    "CustomTransforms",
    "ExpandDims",
    "Flatten",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "StopGradient",
    "Transpose",
    "Unflatten",
}
"""Operations that return a view of an array (a reshape may copy)."""


def operations(arrays: list[Any]) -> int:
    """The number of operations in the graph that computes `arrays`, without views."""
    import mlx.core as mx

    file = io.StringIO()
    mx.export_to_dot(file, arrays)
    names = re.findall(r'label ="(\w+)[^"]*",\s*shape=rectangle', file.getvalue())
    return sum(name not in VIEWS for name in names)


def watched(
    run: Callable[[], list[Completion]], count: bool
) -> tuple[list[Completion], list[float], int]:
    """Runs a rollout and watches how MLX builds the graphs of the token steps.

    Returns the completions, the seconds of building each step, and the operations of the last
    step's graph (0 without `count`).
    """
    from opd_mlx.kernels.recorder import Recorder

    real, built, last = Recorder.run, list[float](), 0

    def step(self: Any, *arguments: Any) -> Any:
        nonlocal last
        begin = time.perf_counter()
        drawn = real(self, *arguments)
        built.append(time.perf_counter() - begin)
        last = operations(drawn) if count else 0
        return drawn

    with mock.patch.object(Recorder, "run", step):
        return run(), built, last


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--n", type=int, default=8, help="completions")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a completion")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        options.layers = 3 if options.quick else options.layers
        rows, device = compared(Path(root), options)
    ours, other = rows[1], rows[0]
    ours["operation_ratio"] = other["operations"] / ours["operations"]
    if not options.no_wall:
        ours["build_ratio"] = other["build ms"] / ours["build ms"]
        ours["wall_ratio"] = other["ms a token"] / ours["ms a token"]
    shape = f"{options.layers} layers, n {options.n}, {options.tokens} tokens"
    measuring.report(
        options,
        "token_step",
        rows,
        device=device,
        shape=shape,
        versions=measuring.versions("mlx", "mlx-vlm"),
    )


def compared(root: Path, options: Any) -> tuple[list[measuring.Row], str]:
    """Measures both of SIDES and checks that the completions are equal; returns rows and device."""
    import transformers

    import opd_mlx
    from opd_mlx.device import this_device

    path = workload.folder(root / "model", 2048, layers=options.layers, **NARROW)
    devices = {
        compiled: replace(this_device(), compiles=compiled, steps_ahead=int(compiled))
        for compiled in SIDES.values()
    }
    backends = {
        compiled: opd_mlx.load(ModelOptions(path), device) for compiled, device in devices.items()
    }
    device = backends[False].device
    prompt = workload.prompt(transformers.AutoConfig.from_pretrained(path), 32)
    draws = np.random.default_rng(0).random((1, options.n, options.tokens), dtype=np.float32)

    def rollout(compiled: bool) -> list[Completion]:
        return backends[compiled].sample([prompt], draws, Sampling(1.0))[0]

    rows, first = [], None
    for name, compiled in SIDES.items():
        completions, _, count = watched(lambda compiled=compiled: rollout(compiled), True)
        first = completions if first is None else first
        error = max(
            float(np.abs(one.logprobs - other.logprobs).max())
            for one, other in zip(completions, first, strict=True)
        )
        assert all(
            np.array_equal(one.tokens, other.tokens)
            for one, other in zip(completions, first, strict=True)
        ), "the sides sample different tokens"
        rows.append({"side": name, "logprob_error": error, "operations": count})
    if options.no_wall:
        return rows, device
    built: dict[str, list[float]] = {name: [] for name in SIDES}
    runs = {
        name: (
            lambda name=name: built[name].extend(watched(lambda: rollout(SIDES[name]), False)[1])
        )
        for name in SIDES
    }
    seconds = measuring.seconds(runs, 1 if options.quick else options.repeats, "mlx")
    for row in rows:
        builds = built[row["side"]]
        row |= {"build ms": 1e3 * statistics.median(builds), "most ms": 1e3 * max(builds)}
        row["ms a token"] = 1e3 * seconds[row["side"]] / options.tokens
    return rows, device


if __name__ == "__main__":
    main()
