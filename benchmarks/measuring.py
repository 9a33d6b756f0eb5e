"""Measures FLOPs, peak memory and interleaved times for all benchmarks, and prints the results.

torch's counter counts the FLOPs of matrix products and convolutions. Attention is counted by one
formula on all sides: per head and pair of a query and a visible key, 4 d in the forward (scores
and weighted sum) and 8 d in the backward, where d is the head's width. A kernel may compute more,
for example full scores under a causal mask; both sides are counted alike.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode

from opd_torch.kernels import flash

Row = dict[str, Any]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", action="store_true", help="one object on one line instead of a table"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a small shape, once: for seeing that it runs"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=5,
        help="timed runs of each side, after one that is not timed",
    )
    parser.add_argument(
        "--no-wall",
        action="store_true",
        help="no times: FLOPs and memory do not depend on who else uses the machine",
    )
    return parser


def peer(name: str) -> None:
    """Exits with a message of one line if a peer is not installed."""
    from importlib.util import find_spec

    if find_spec(name) is None:
        sys.exit(
            f"{name} is not installed; this benchmark needs it: pip install 'vision-opd[bench]'"
        )


Name = TypeVar("Name", bound=Hashable)


def track(work: Sequence[Any], what: str) -> Iterable[Any]:
    """Yields the items of `work`, with a progress bar on stderr that shows the remaining time."""
    from rich.console import Console
    from rich.progress import track

    return track(work, what, console=Console(stderr=True), transient=True)


class _Attention(torch.autograd.Function):
    """torch's attention, hidden from the counter of products; adds the needed FLOPs to `count` in
    the forward and in the backward."""

    @staticmethod
    def forward(
        ctx: Any, count: AttentionCount, products: int, options: dict[str, Any], *inputs: Tensor
    ) -> Tensor:
        count.total += 4 * products
        ctx.count, ctx.products, ctx.options = count, products, options
        ctx.save_for_backward(*inputs)
        query, key, value = inputs
        if query.is_meta:
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        with _disable_current_modes():
            return scaled_dot_product_attention(query, key, value, **options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        ctx.count.total += 8 * ctx.products
        inputs = ctx.saved_tensors
        if gradient.is_meta:
            return None, None, None, *(torch.empty_like(x) for x in inputs)
        with _disable_current_modes(), torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in inputs]
            gradients = torch.autograd.grad(
                scaled_dot_product_attention(*inputs, **ctx.options), inputs, gradient
            )
        return None, None, None, *gradients


class AttentionCount:
    """Replaces torch's attention and `opd_torch.kernels.flash` by counted ones inside a `with`.

    A torch dispatch mode would not see what a backward recomputes, so the functions themselves are
    replaced. On the meta device a mask has no values; `completion`, the number of rows of a
    completion, then gives the pairs of queries and visible keys.
    """

    def __init__(self, completion: int | None = None) -> None:
        self.completion, self.total = completion, 0
        self._patches = ExitStack()

    def __enter__(self) -> AttentionCount:
        name = "scaled_dot_product_attention"
        modules = [
            module
            for module in list(sys.modules.values())
            if getattr(module, "__dict__", {}).get(name) is scaled_dot_product_attention
        ]
        for module in modules:
            if module.__name__ != __name__:
                self._patches.enter_context(mock.patch.object(module, name, self))
        for name, cost in (("attention", 4), ("attention_backward", 8)):
            kernel = functools.partial(self._kernel, getattr(flash, name), cost)
            self._patches.enter_context(mock.patch.object(flash, name, kernel))
        return self

    def __exit__(self, *_: object) -> None:
        self._patches.close()

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """Runs torch's attention and counts the needed FLOPs."""
        pairs = self._pairs(query, key, attn_mask, options.get("is_causal", False))
        return _Attention.apply(
            self, pairs * query.shape[-1], {"attn_mask": attn_mask, **options}, query, key, value
        )

    def _kernel(self, kernel: Callable[..., Any], cost: int, *arguments: Any) -> Any:
        """Runs the forward (cost 4) or backward (cost 8) kernel of `opd_torch.kernels.flash`,
        hidden from the counter of products, and counts the needed FLOPs."""
        *_, bias, causal, _ = arguments
        query, key = arguments[:2] if cost == 4 else arguments[1:3]
        self.total += cost * self._pairs(query, key, bias, causal) * query.shape[-1]
        with _disable_current_modes():
            return kernel(*arguments)

    def _pairs(self, query: Tensor, key: Tensor, mask: Tensor | None, causal: bool) -> int:
        rows, heads, length = query.shape[:3]
        keys = key.shape[2]
        if mask is None:
            return rows * heads * (length * (length + 1) // 2 if causal else length * keys)
        if mask.is_meta:  # queries that share a key are folded into `length`
            assert self.completion is not None, "a mask without values"
            return (
                rows
                * heads
                * (length // self.completion)
                * (
                    self.completion * (keys - self.completion)
                    + self.completion * (self.completion + 1) // 2
                )
            )
        seen = mask if mask.dtype == torch.bool else mask > -1e30
        seen = seen.reshape(*(1,) * (4 - seen.ndim), *seen.shape)
        return (
            int(seen.expand(*seen.shape[:2], length, keys).sum())
            * rows
            * heads
            // (seen.shape[0] * seen.shape[1])
        )


def _addmm(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _convolution_backward(gradient: Any, inputs: Any, weight: Any, *rest: Any, **_: Any) -> int:
    of_inputs, of_weight, _ = rest[7]  # which gradients the backward computes
    product = int(2 * gradient[0] * np.prod(gradient[2:]) * np.prod(weight))
    return product * (int(of_inputs) + int(of_weight))


CORRECTED = {
    torch.ops.aten.addmm_: _addmm,
    torch.ops.aten.convolution_backward: _convolution_backward,
}
"""Corrections to the counter of torch 2.13. It counts 0 for products that are added in place, of
which a head's gradient consists (ours and TRL's), and it ignores the groups in the backward of a
grouped convolution."""


def flops(run: Callable[[], Any], completion: int | None = None) -> int:
    """FLOPs of `run`, with all recomputation; `completion` as in `AttentionCount`."""
    attention = AttentionCount(completion)
    products = FlopCounterMode(display=False, custom_mapping=CORRECTED)
    with products, attention:
        run()
    return int(products.get_total_flops()) + attention.total


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """The peak of allocated bytes during `run`, above the bytes allocated before.

    On the CPU a profiler follows every tensor's allocation and release; on CUDA and MLX the
    allocator reports the peak.
    """
    gc.collect()  # else arrays in reference cycles may be freed during `run`, which lowers the peak
    if device == "mlx":
        import mlx.core as mx

        mx.synchronize()  # a stream lets go of arrays in a thread of its own
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        run()
        return int(mx.get_peak_memory() - before)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    ]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(np.cumsum(sizes).max(initial=0))


def interleaved(
    runs: Mapping[Name, Callable[[], Any]],
    repeats: int,
    device: str = "cpu",
    what: str | None = None,
) -> dict[Name, list[float]]:
    """Seconds of every run by name: `repeats` times each, after a run that is not timed.

    The sides take turns, and each round begins with another side. With `what`, a progress bar on
    stderr counts the runs.
    """
    times: dict[Name, list[float]] = {name: [] for name in runs}
    names = list(runs)
    turns = [
        (number, name)
        for number in range(repeats + 1)
        for name in names[number % len(names) :] + names[: number % len(names)]
    ]
    for number, name in track(turns, what) if what else turns:
        _wait(device)
        begin = time.perf_counter()
        runs[name]()
        _wait(device)
        if number:
            times[name].append(time.perf_counter() - begin)
    return times


def seconds(
    runs: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of every run by name, as `interleaved` measures them."""
    return {
        name: statistics.median(values)
        for name, values in interleaved(runs, repeats, device).items()
    }


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def relative_error(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> float:
    """The largest ||a - b|| / max(||b||, 1e-3 * global norm) over tensors of equal names."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:4]
    theirs = {name: np.asarray(value, np.float64) for name, value in theirs.items()}
    everything = np.sqrt(sum(float((value**2).sum()) for value in theirs.values()))
    return max(
        float(
            np.linalg.norm(np.asarray(ours[name], np.float64) - value)
            / max(np.linalg.norm(value), 1e-3 * everything)
        )
        for name, value in theirs.items()
    )


def same(loss: tuple[float, float], gradient: float, most: float = 1e-3) -> Row:
    """Returns the errors of loss and gradient.

    Raises AssertionError if one is `most` or more: two sides that compute different things must
    not be compared.
    """
    error = abs(loss[0] - loss[1]) / abs(loss[1])
    assert max(error, gradient) < most, (
        f"the sides differ: loss {loss[0]} and {loss[1]}, gradient {gradient:.1e}"
    )
    return {"loss_error": error, "gradient_error": gradient}


def ratios(ours: Row, theirs: Row, least: float | None = None) -> Row:
    """The peer's FLOPs, seconds and bytes divided by ours, where both rows have them.

    With `least`, the FLOPs that a group needs, also `bound` (the peer's FLOPs over `least`) and
    `reached` (`least` over our FLOPs).
    """
    names = {"flops": "flop_ratio", "seconds": "wall_ratio", "bytes": "memory_ratio"}
    quotients: Row = {
        ratio: theirs[name] / ours[name]
        for name, ratio in names.items()
        if ours.get(name) and theirs.get(name)
    }
    if least and theirs.get("flops"):
        quotients |= {"bound": theirs["flops"] / least, "reached": least / ours["flops"]}
    return quotients


def versions(*names: str) -> dict[str, str]:
    """Versions of the packages that every benchmark uses, and of those in `names` that are
    installed."""
    installed = {"python": platform.python_version()}
    for name in ("vision-opd", "numpy", "torch", "transformers", *names):
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            continue
    return installed


def device_name(device: str = "cpu") -> str:
    """The name of the GPU, or the CPU's architecture and torch's number of threads."""
    if device.startswith("cuda"):
        return str(torch.cuda.get_device_name())
    return f"{platform.machine()} CPU, {torch.get_num_threads()} torch thread(s)"


def report(options: argparse.Namespace, name: str, rows: Sequence[Row], **about: Any) -> Row:
    """Prints the rows as a table, or under `--json` everything as one object on one line.

    Returns that object.
    """
    result = {"benchmark": name, **about, "rows": list(rows)}
    if options.json:
        print(json.dumps(result))
        return result
    for key, value in about.items():
        if isinstance(value, dict):
            print(f"{key}: {', '.join(f'{name} {show(part)}' for name, part in value.items())}")
        else:
            print(f"{key}: {show(value)}")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([show(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for first, *others in cells:
        padded = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *padded]))
    return result


def show(value: Any) -> str:
    """Formats a number for a table: three digits, with a letter for large powers of ten."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, float) and abs(value) < 1e-2 and value:
        return f"{value:.1e}"
    if abs(value) >= 1e5:
        scales = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
        letter, scale = next((key, size) for key, size in scales.items() if abs(value) >= size)
        return f"{value / scale:.3g} {letter}"
    return f"{value:.3f}" if isinstance(value, float) else str(value)
