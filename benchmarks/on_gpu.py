"""Times every stage of a step on one GPU, with a random Qwen3-VL-4B, in less than ten minutes.

    python -m benchmarks.on_gpu [--prompt 4096 --completion 128 --n 8 --crop 1024] [--trl]
                                [--peak-tflops 989] [--json]
    python -m benchmarks.on_gpu --small --device cpu        shows that it runs, without a GPU

The stages are rollout, student, teacher, head and the whole step; the report has seconds, peak
memory and MFU. The model computes in bfloat16 on float32 parameters, teacher, moments and
gradient, so the 4B model takes 90 GB before activations. `needed` are the FLOPs of `arithmetic`
without recomputation, and MFU is `needed` over seconds and `--peak-tflops` (dense bfloat16: H100
and H200 989, A100 312). Memory bounds decoding: `mbu` is the bytes of the weights and of the
prompt's keys and values over seconds per token and `--bandwidth-tbs` (H200 4.8, H100 3.35).

The first rival is our code on n rows, one after the other. With `--trl` the second is TRL's
`DistillationTrainer`, one row at a time, on stock modules with the same weights: TRL's training
stage, and a step of `generate` for all n rows with that stage. TRL's step has no optimizer; ours
has. Before anything is timed, loss and gradient of each rival are compared with ours. The
benchmark writes results/on_gpu_PROMPT_COMPLETION.json.
"""

from __future__ import annotations

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import against_rows, arithmetic, measuring, workload
from benchmarks.against_rows import FULL
from benchmarks.workload import Shape
from opd.types import Group, Sampling, Update
from opd_torch import gradient
from opd_torch.batch import lay_out
from opd_torch.footprint import activation_bytes, recompute_share
from opd_torch.forward import hidden_states

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = measuring.arguments(__doc__)
    against_rows.shape_options(parser)
    parser.set_defaults(prompt=4096, completion=128, crop=1024, repeats=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--small", action="store_true", help="a small model and shape, and nothing written"
    )
    parser.add_argument("--trl", action="store_true", help="also TRL")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the card"
    )
    parser.add_argument(
        "--bandwidth-tbs", type=float, default=4.8, help="TB/s of the card's memory"
    )
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(
            2,
            "torch sees no GPU on this machine; --small --device cpu shows that the script runs\n",
        )
    if options.trl:
        measuring.peer("trl")
    shape = (
        Shape(96, 16, 4, 32)
        if options.small
        else Shape(options.prompt, options.completion, options.n, options.crop)
    )
    config = workload.small_qwen3_vl() if options.small else workload.qwen3_vl_4b()
    made = workload.model(config, options.device)
    stock = _sharing(made, made.parameters())
    backend = workload.backend(made, "bfloat16")
    workload.perturb_teacher(backend)
    group = workload.group(config, shape)
    stages = ours(backend, group, config)
    rivals = {"own rows": rows_side(backend, group)}
    with tempfile.TemporaryDirectory() as out:
        if options.trl:
            teacher = _sharing(stock, backend._teacher.module.parameters())
            rivals["TRL"], generate = trl_side(stock, teacher, group, Path(out), options.device)
        errors = {name: agree(stages["training stage"], side) for name, side in rivals.items()}
        print(f"errors: {errors}", file=sys.stderr, flush=True)
        runs = {**stages, **rivals, **({"TRL, rollout": generate} if options.trl else {})}
        rows = []
        for name, run in runs.items():
            rows.append(measured(name, run, options))
            # A run may be cut off, so every result is printed as soon as it is there.
            print(
                f"{name}: {rows[-1]['seconds']:.4f} s, {rows[-1]['bytes'] / 1e9:.2f} GB",
                file=sys.stderr,
                flush=True,
            )
    with_flops(rows, config, shape, options)
    batch = lay_out(
        [group.student], [[completion.tokens for completion in group.completions]], made.device
    )
    recompute = recompute_share(backend._student, activation_bytes(backend._student, batch))
    about = {
        "device": measuring.device_name(options.device),
        "shape": str(shape),
        "sizes": against_rows.sizes(config),
        "errors": errors,
        "layers_computed_again": recompute,
    }
    result = measuring.report(
        options, "on_gpu", rows, **about, versions=measuring.versions("trl", "triton")
    )
    if not options.small:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"on_gpu_{shape.prompt}_{shape.completion}.json").write_text(
            json.dumps(result, indent=1) + "\n"
        )


def ours(backend: Any, group: Group, config: Any) -> dict[str, Callable[[], Any]]:
    """The stages of a step with our code: each one separately, then the whole step."""
    n, length = len(group.completions), len(group.completions[0])
    uniforms = np.random.default_rng(0).random((1, n, length), dtype=np.float32)
    sampling = Sampling(temperature=1.0, banned=(config.image_token_id, config.video_token_id))
    model, teacher_model = backend._student, backend._teacher
    (student_hidden,) = gradient._hidden(model, [group.student], [[group]])
    (teacher_hidden,) = gradient._hidden(teacher_model, [group.teacher], [[group]])
    batch = lay_out(
        [group.student],
        [[completion.tokens for completion in group.completions]],
        model.device.torch,
    )

    def rollout(tokens: int) -> None:
        backend.sample([group.student], uniforms[:, :, :tokens], sampling)

    def student() -> None:
        recompute = recompute_share(model, activation_bytes(model, batch))
        with model.autocast():
            hidden = hidden_states(model, batch, recompute)
        torch.autograd.grad(
            hidden, list(model.parameters.values()), torch.ones_like(hidden), allow_unused=True
        )

    def stage() -> tuple[float, dict[str, Any]]:
        loss = against_rows.loss_of([group], backend.accumulate([group], FULL))
        parameter_gradients, backend._gradient = backend._gradient, {}
        return loss, parameter_gradients

    def optimizer() -> None:
        # Rate 0 leaves the weights as they are, so that later stages compute on the same weights.
        backend.apply(Update(learning_rate=0.0))
        backend.move_teacher(0.0)

    def step() -> None:
        rollout(length)
        backend.accumulate([group], FULL)
        optimizer()

    return {
        "rollout, 1 token": lambda: rollout(1),
        "rollout": lambda: rollout(length),
        "teacher": lambda: gradient._hidden(teacher_model, [group.teacher], [[group]]),
        "student": student,
        "head": lambda: gradient._divergence(
            model, teacher_model, student_hidden, teacher_hidden, [group], FULL, gradient=True
        ),
        "training stage": stage,
        "optimizer": optimizer,
        "step": step,
    }


def rows_side(backend: Any, group: Group) -> Callable[[], tuple[float, dict[str, Any]]]:
    """A function that runs the training stage with our code, one row after the other."""

    def run() -> tuple[float, dict[str, Any]]:
        loss = sum(
            against_rows.loss_of([row], backend.accumulate([row], FULL))
            for row in workload.rows_of(group)
        )
        parameter_gradients, backend._gradient = backend._gradient, {}
        return loss, parameter_gradients

    return run


def _sharing(model: Any, parameters: Any) -> Any:
    """Copies a model's modules, but uses `parameters` instead of copies of the model's."""
    return copy.deepcopy(
        model, {id(old): new for old, new in zip(model.parameters(), parameters, strict=True)}
    )


def trl_side(
    student: Any, teacher: Any, group: Group, out: Path, device: str
) -> tuple[Callable[[], tuple[float, dict[str, Any]]], Callable[[], None]]:
    """Functions that run TRL's training stage and TRL's rollout.

    The training stage takes a row at a time with TRL's defaults, bfloat16 and gradient
    checkpointing. The rollout is transformers' `generate` for all rows at once.
    """
    import transformers

    from benchmarks import against_trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(
        Path(workload.__file__).parent.parent / "opd" / "tiny" / "model"
    )
    made = against_trl.trainer(
        student, teacher, tokenizer, out, recompute=True, bf16=device.startswith("cuda")
    )
    run = against_trl.side(made, group, 1, device)

    def in_bfloat16() -> tuple[float, dict[str, Any]]:
        # Only TRL's `train()` would set up half precision, and it does not run here.
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            result = run()
        student.eval()
        return result

    n, length = len(group.completions), len(group.completions[0])
    prompts = against_trl.batch(
        group.student, group, range(n), student.config.image_token_id, device
    )
    inputs = {
        "input_ids": prompts["prompt_ids"],
        "attention_mask": prompts["prompt_mask"],
        "mm_token_type_ids": prompts["mm_token_type_ids"][:, : prompts["prompt_ids"].shape[1]],
        "pixel_values": prompts["pixel_values"],
        "image_grid_thw": prompts["image_grid_thw"],
    }
    free = transformers.GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=length,
        min_new_tokens=length,
        pad_token_id=0,
    )

    def generate() -> None:
        student.eval()
        with torch.no_grad(), torch.autocast(torch.device(device).type, torch.bfloat16):
            rows = student.generate(**inputs, generation_config=free)
        assert rows.shape == (n, prompts["prompt_ids"].shape[1] + length)

    return in_bfloat16, generate


def agree(ours: Callable[[], Any], theirs: Callable[[], Any]) -> measuring.Row:
    """Compares loss and gradient; in bfloat16 two sides agree to some percent."""
    loss, gradient = ours()
    their_loss, their_gradient = theirs()
    difference = norm = 0.0
    for name, value in their_gradient.items():
        difference += float((gradient[name].float() - value.float()).square().sum())
        norm += float(value.float().square().sum())
    return measuring.same((loss, their_loss), (difference / norm) ** 0.5, most=0.05)


def measured(name: str, run: Callable[[], Any], options: Any) -> measuring.Row:
    """Measures the seconds and the peak memory of one stage."""
    return {
        "stage": name,
        "seconds": measuring.seconds({name: run}, options.repeats, options.device)[name],
        "bytes": measuring.peak_bytes(run, options.device),
    }


def with_flops(rows: list[measuring.Row], config: Any, shape: Shape, options: Any) -> None:
    """Adds to the rows the needed FLOPs, MFU or MBU, and the ratios of the rivals to our code."""
    text, rows_of_completions = config.text_config, shape.n * shape.completion
    head = 4 * 2 * rows_of_completions * text.hidden_size * text.vocab_size
    teacher = arithmetic.trunk(config, shape.crop or shape.prompt, shape.completion, shape.n)
    student = arithmetic.trunk(config, shape.prompt, shape.completion, shape.n, backward=True)
    needed = {
        "rollout": arithmetic.trunk(config, shape.prompt, shape.completion, shape.n) + head // 4,
        "teacher": teacher,
        "student": student,
        "head": head,
        "training stage": teacher + student + head,
    }
    by_name = {row["stage"]: row for row in rows}
    for name, value in needed.items():
        by_name[name] |= {
            "needed": value,
            "mfu": value / by_name[name]["seconds"] / (options.peak_tflops * 1e12),
        }
    token = (by_name["rollout"]["seconds"] - by_name["rollout, 1 token"]["seconds"]) / (
        shape.completion - 1
    )
    by_name["rollout"] |= {
        "ms_a_token": 1e3 * token,
        "mbu": token_bytes(config, shape) / token / (options.bandwidth_tbs * 1e12),
    }
    stage, step = by_name["training stage"], by_name["step"]
    for name in ("own rows", "TRL"):
        if name in by_name:
            by_name[name] |= measuring.ratios(stage, by_name[name])
    if options.trl:
        rollout, training = by_name["TRL, rollout"], by_name["TRL"]
        whole = {name: rollout[name] + training[name] for name in ("seconds",)} | {
            "bytes": max(rollout["bytes"], training["bytes"])
        }
        rollout |= measuring.ratios(by_name["rollout"], rollout)
        rows.append({"stage": "TRL, step", **whole, **measuring.ratios(step, whole)})


def token_bytes(config: Any, shape: Shape) -> int:
    """The least bytes that a token step of all n completions reads: the weights, and the prompt's
    keys and values once, all in bfloat16."""
    text = config.text_config
    heads, groups = (
        count * text.head_dim for count in (text.num_attention_heads, text.num_key_value_heads)
    )
    layer = text.hidden_size * (2 * heads + 2 * groups + 3 * text.intermediate_size)
    return 2 * (
        text.num_hidden_layers * (layer + 2 * groups * shape.prompt)
        + text.vocab_size * text.hidden_size
    )


if __name__ == "__main__":
    main()
