"""What does training on a group save against training on n separate rows?

    python -m benchmarks.against_rows [--backend torch|mlx] [--prompt 768 --completion 128 --n 8]
                                      [--json] [--quick]

The benchmark compares FLOPs, wall time and peak memory above the resident state. It runs the
training stage of one group: student forward and backward, teacher forward on a crop, divergence,
gradients of all parameters. The other sides are:
  own rows          our code on n groups of one completion in one call: it computes the text n
                    times and the image once, because prompts with the same key share an image
  own, row by row   our code in n calls: it computes everything n times, in the memory of one row
  stock rows        transformers (or mlx-vlm) with one row after the other: its own forward, the
                    completion's full logits, autograd
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import arithmetic, measuring, workload
from benchmarks.workload import Shape
from opd.objective import Objective
from opd.types import Group, ModelOptions

FULL = Objective(alpha=0.5, top_k=None, ratio_clip=None)
SIZES = {
    "hidden": 512,
    "layers": 6,
    "heads": 8,
    "kv_heads": 2,
    "head_dim": 64,
    "mlp": 1536,
    "vision_hidden": 256,
    "vision_layers": 4,
    "vision_heads": 4,
    "vision_mlp": 768,
    "positions": 1024,
}
QUICK_SIZES = {
    **SIZES,
    "hidden": 128,
    "layers": 3,
    "heads": 4,
    "head_dim": 32,
    "mlp": 256,
    "vision_hidden": 64,
    "vision_layers": 3,
    "vision_mlp": 128,
    "positions": 256,
}


def shape_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that set the measured shape; the default shape has P = 6 R."""
    parser.add_argument("--prompt", type=int, default=384, help="tokens of the student's prompt")
    parser.add_argument("--completion", type=int, default=64, help="tokens of a completion")
    parser.add_argument(
        "--crop", type=int, default=96, help="tokens of the teacher's prompt; 0: the student's"
    )
    parser.add_argument("--n", type=int, default=8, help="completions")
    parser.add_argument("--vocabulary", type=int, default=16384)


def shape_of(options: argparse.Namespace) -> Shape:
    """The shape that the options name; a small one under `--quick`."""
    if options.quick:
        return Shape(96, 16, 8, 32 if options.crop else 0)
    return Shape(options.prompt, options.completion, options.n, options.crop)


def case(options: argparse.Namespace, path: Path) -> tuple[Path, Any, Group]:
    """Makes a random model; returns its folder, its configuration and a group of random tokens."""
    import transformers

    workload.folder(
        path,
        512 if options.quick else options.vocabulary,
        **(QUICK_SIZES if options.quick else SIZES),
    )
    config = transformers.AutoConfig.from_pretrained(path)
    return path, config, workload.group(config, shape_of(options))


def of_torch(
    path: Path, group: Group
) -> tuple[dict[str, Callable[[], tuple[float, dict[str, Any]]]], Any]:
    """Functions that compute loss and gradients on torch, by side; and our backend."""
    import torch
    import transformers

    import opd_torch

    ours = opd_torch.load_cpu(ModelOptions(path))
    workload.perturb_teacher(ours)
    student = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    teacher = transformers.AutoModelForImageTextToText.from_pretrained(
        path, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    teacher.load_state_dict(
        {name: value.detach() for name, value in ours._teacher.module.state_dict().items()}
    )
    names = {parameter: name for name, parameter in student.named_parameters()}

    def run(*calls: list[Group], split: int = 0) -> tuple[float, dict[str, Any]]:
        loss = sum(loss_of(groups, ours.accumulate(groups, FULL, split)) for groups in calls)
        gradient, ours._gradient = ours._gradient, {}
        return loss, gradient

    def stock() -> tuple[float, dict[str, Any]]:
        loss = 0.0
        for completion, weights in zip(group.completions, group.weights, strict=True):
            with torch.no_grad():
                t = logits_of(teacher, group.teacher, completion.tokens).log_softmax(-1)
            s = logits_of(student, group.student, completion.tokens).log_softmax(-1)
            value = (torch.from_numpy(weights) * divergence(s, t)).sum()
            value.backward()
            loss += float(value.detach())
        gradient = {
            name: parameter.grad for parameter, name in names.items() if parameter.grad is not None
        }
        student.zero_grad(set_to_none=True)
        return loss, gradient

    return {**our_sides(run, group), "stock rows": stock}, ours


def our_sides(
    run: Callable[..., tuple[float, dict[str, Any]]], group: Group
) -> dict[str, Callable[[], tuple[float, dict[str, Any]]]]:
    """The ways in which our code computes a group.

    `run` takes lists of groups and calls `accumulate` once for each list.
    """
    rows = workload.rows_of(group)
    return {
        "group": lambda: run([group]),
        "group, split": lambda: run([group], split=1),
        "own rows": lambda: run(rows),
        "own, row by row": lambda: run(*([row] for row in rows)),
    }


def logits_of(model: Any, prompt: Any, tokens: Any) -> Any:
    """Stock transformers' logits [R, V] at the rows that predict `tokens` [R]."""
    import torch

    ids = torch.from_numpy(np.concatenate([prompt.tokens, tokens]).astype(np.int64))[None]
    out = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=torch.from_numpy(prompt.images["pixel_values"]),
        image_grid_thw=torch.from_numpy(prompt.images["image_grid_thw"]).long(),
        use_cache=False,
        logits_to_keep=len(tokens) + 1,
    )
    return out.logits[0, :-1]


def divergence(s: Any, t: Any) -> Any:
    """Jensen-Shannon divergence [R] of log-probabilities [R, V], written out for autograd."""
    import torch

    m = torch.logaddexp(s + np.log(0.5), t + np.log(0.5))
    return 0.5 * (s.exp() * (s - m) + t.exp() * (t - m)).sum(-1)


def of_mlx(
    path: Path, group: Group
) -> tuple[dict[str, Callable[[], tuple[float, dict[str, Any]]]], Any]:
    """Functions that compute loss and gradients on MLX, by side; and our backend."""
    import mlx.core as mx
    from mlx.utils import tree_flatten, tree_unflatten
    from mlx_vlm.utils import load_model

    import opd_mlx
    from tests.support.mlx_cases import channels_second, hugging_face, stock_logits

    ours = opd_mlx.load(ModelOptions(path))
    keys = mx.random.split(mx.random.key(7), len(ours._teacher))
    ours._teacher = {
        name: value + 0.1 * mx.std(value) * mx.random.normal(value.shape, key=key)
        for key, (name, value) in zip(keys, ours._teacher.items(), strict=True)
    }
    student, teacher = load_model(path), load_model(path)
    teacher.load_weights(list(ours._teacher.items()), strict=False)
    mx.eval(ours._teacher, student.parameters(), teacher.parameters())
    names, values = zip(*tree_flatten(student.parameters()), strict=True)

    def run(*calls: list[Group], split: int = 0) -> tuple[float, dict[str, Any]]:
        loss = sum(loss_of(groups, ours.accumulate(groups, FULL, split)) for groups in calls)
        gradient, ours._gradient = ours._gradient, {}
        return loss, ours._model.to_hugging_face(gradient)

    def stock() -> tuple[float, dict[str, Any]]:
        total: dict[str, Any] = {}
        loss = 0.0
        for completion, weights in zip(group.completions, group.weights, strict=True):
            logits = stock_logits(teacher, group.teacher, completion.tokens)
            t = logits - mx.logsumexp(logits, -1, keepdims=True)
            mx.eval(t)

            def value(
                *parameters: Any, completion: Any = completion, weights: Any = weights, t: Any = t
            ) -> Any:
                student.update(tree_unflatten(list(zip(names, parameters, strict=True))))
                s = stock_logits(student, group.student, completion.tokens)
                s = s - mx.logsumexp(s, -1, keepdims=True)
                m = mx.logaddexp(s, t) + np.log(0.5)
                return (
                    mx.array(weights) * 0.5 * (mx.exp(s) * (s - m) + mx.exp(t) * (t - m)).sum(-1)
                ).sum()

            row_loss, gradients = mx.value_and_grad(value, argnums=list(range(len(values))))(
                *values
            )
            total = {
                name: total[name] + gradient if total else gradient
                for name, gradient in zip(names, gradients, strict=True)
            }
            mx.eval(row_loss, total)
            loss += row_loss.item()
        student.update(tree_unflatten(list(zip(names, values, strict=True))))
        return loss, {hugging_face(name): channels_second(value) for name, value in total.items()}

    return {**our_sides(run, group), "stock rows": stock}, ours


def loss_of(groups: list[Group], statistics: Any) -> float:
    """The loss of a step, from the statistics of each completion's tokens by group."""
    loss = 0.0
    for group, group_statistics in zip(groups, statistics, strict=True):
        for weights, tokens in zip(group.weights, group_statistics, strict=True):
            loss += float((weights.astype(np.float64) * tokens.ratio * tokens.divergence).sum())
    return loss


def compared(
    sides: dict[str, Callable[[], tuple[float, dict[str, Any]]]],
    options: argparse.Namespace,
    device: str,
    least: int | None,
) -> list[measuring.Row]:
    """Measures every side, ours first, and returns a row for each.

    Raises where a side's loss or gradient differs from ours, before anything is measured.
    """
    first = next(iter(sides))
    arrays: dict[str, tuple[float, dict[str, Any]]] = {}
    rows: dict[str, measuring.Row] = {}
    for name, side in sides.items():
        loss, gradient = side()
        arrays[name] = (
            loss,
            {key: np.asarray(value, np.float32).copy() for key, value in gradient.items()},
        )
        ours = arrays[first]
        rows[name] = {
            "side": name,
            **measuring.same((ours[0], loss), measuring.relative_error(ours[1], arrays[name][1])),
        }
    del arrays, gradient
    for name, side in sides.items():
        if device != "mlx":  # MLX has no counter
            rows[name]["flops"] = measuring.flops(side)
        rows[name]["bytes"] = measuring.peak_bytes(side, device)
    if not options.no_wall:
        for name, value in measuring.seconds(
            sides, 1 if options.quick else options.repeats, device
        ).items():
            rows[name]["seconds"] = value
    for name in list(rows)[1:]:
        rows[name] |= measuring.ratios(rows[first], rows[name], least if device != "mlx" else None)
    return list(rows.values())


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    shape_options(parser)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        path, config, group = case(options, Path(root) / "model")
        sides, ours = (of_torch if options.backend == "torch" else of_mlx)(path, group)
        shape = shape_of(options)
        rows = compared(
            sides,
            options,
            "cpu" if options.backend == "torch" else "mlx",
            arithmetic.group(config, shape),
        )
        about = {
            "device": ours.device,
            "backend": options.backend,
            "shape": str(shape),
            "sizes": sizes(config),
        }
        measuring.report(
            options, "against_rows", rows, **about, versions=measuring.versions("mlx", "mlx-vlm")
        )


def sizes(config: Any) -> dict[str, int]:
    """The model's sizes, for the report."""
    text, vision = config.text_config, config.vision_config
    return {
        "hidden": text.hidden_size,
        "layers": text.num_hidden_layers,
        "vocabulary": text.vocab_size,
        "vision_hidden": vision.hidden_size,
        "vision_layers": vision.depth,
    }


if __name__ == "__main__":
    main()
