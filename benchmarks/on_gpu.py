"""One GPU, one random Qwen3-VL-4B, under ten minutes: rollout, student, teacher, head, whole step, peak memory and MFU.

    python -m benchmarks.on_gpu [--prompt 4096 --completion 128 --n 8 --crop 1024] [--trl] [--peak-tflops 989] [--json]
    python -m benchmarks.on_gpu --small --device cpu        that it runs, without a GPU

bfloat16 compute on float32 parameters, teacher, moments and gradient: the 4B model takes 90 GB before activations. `needed` are the
FLOPs of `arithmetic.py`, without computing layers again; MFU is those over seconds and `--peak-tflops` (dense bfloat16: H100 and H200
989, A100 312).
Against it: n rows through our own code, one by one, and with `--trl` TRL's `DistillationTrainer` on one row at a time. Before anything is
timed, the loss and the gradient of both are compared with ours. Writes results/on_gpu_PROMPT_COMPLETION.json.
"""

from __future__ import annotations

import json
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
from opd_torch.batch import lay_out, lay_out_targets
from opd_torch.forward import CHECKPOINT_ABOVE, activation_bytes, hidden_states

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = measuring.arguments(__doc__)
    against_rows.shape_options(parser)
    parser.set_defaults(prompt=4096, completion=128, crop=1024, repeats=3)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--small", action="store_true", help="a small model and shape, and nothing written")
    parser.add_argument("--trl", action="store_true", help="also TRL")
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16 TFLOP/s of the card")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.exit(2, "torch sees no GPU on this machine; --small --device cpu shows that the script runs\n")
    if options.trl:
        measuring.peer("trl")
    shape = Shape(96, 16, 4, 32) if options.small else Shape(options.prompt, options.completion, options.n, options.crop)
    config = workload.small_qwen3_vl() if options.small else workload.qwen3_vl_4b()
    backend = workload.backend(workload.model(config, options.device), "bfloat16")
    workload.apart(backend)
    group = workload.group(config, shape)
    stages = ours(backend, group, config)
    rivals = {"own rows": rows_side(backend, group)}
    with tempfile.TemporaryDirectory() as out:
        if options.trl:
            rivals["TRL"] = trl_side(backend, group, Path(out), options.device)
        errors = {name: agree(stages["training stage"], side) for name, side in rivals.items()}
        rows = [measured(name, run, options) for name, run in {**stages, **rivals}.items()]
    with_flops(rows, config, shape, options.peak_tflops)
    about = {"device": measuring.device_name(options.device), "shape": str(shape), "sizes": against_rows.sizes(config), "errors": errors}
    result = measuring.report(options, "on_gpu", rows, **about, versions=measuring.versions("trl", "triton"))
    if not options.small:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"on_gpu_{shape.prompt}_{shape.completion}.json").write_text(json.dumps(result, indent=1) + "\n")


def ours(backend: Any, group: Group, config: Any) -> dict[str, Callable[[], Any]]:
    """The stages of a step on our side, each apart and then together."""
    n, length = len(group.completions), len(group.completions[0])
    uniforms = np.random.default_rng(0).random((1, n, length), dtype=np.float32)
    sampling = Sampling(temperature=1.0, banned=(config.image_token_id, config.video_token_id))
    targets = lay_out_targets([group], backend._device)
    (student_hidden,), (teacher_hidden,) = (backend._hidden(policy, [group], [[group]]) for policy in ("student", "teacher"))
    batch = lay_out([group.student], [[one.tokens for one in group.completions]], backend._device)

    def rollout(tokens: int) -> None:
        backend.sample([group.student], uniforms[:, :, :tokens], sampling)

    def student() -> None:
        again = activation_bytes(backend._student, batch, backend._dtype.itemsize) > CHECKPOINT_ABOVE
        with backend._autocast():
            found = hidden_states(backend._student, batch, again)
        torch.autograd.grad(found, list(backend._parameters.values()), torch.ones_like(found), allow_unused=True)

    def stage() -> tuple[float, dict[str, Any]]:
        loss = against_rows.loss_of([group], backend.accumulate([group], FULL))
        found, backend._gradient = backend._gradient, {}
        return loss, found

    def step() -> None:
        rollout(length)
        backend.accumulate([group], FULL)
        backend.apply(Update(learning_rate=0.0))  # the weights stay, and with them what the sides are compared on
        backend.move_teacher(0.0)

    return {
        "rollout, 1 token": lambda: rollout(1),
        "rollout": lambda: rollout(length),
        "teacher": lambda: backend._hidden("teacher", [group], [[group]]),
        "student": student,
        "head": lambda: backend._divergence(student_hidden, teacher_hidden, targets, FULL, gradient=True),
        "training stage": stage,
        "step": step,
    }


def rows_side(backend: Any, group: Group) -> Callable[[], tuple[float, dict[str, Any]]]:
    """The training stage row by row through our own code."""

    def run() -> tuple[float, dict[str, Any]]:
        loss = sum(against_rows.loss_of([row], backend.accumulate([row], FULL)) for row in workload.rows_of(group))
        found, backend._gradient = backend._gradient, {}
        return loss, found

    return run


def trl_side(backend: Any, group: Group, out: Path, device: str) -> Callable[[], tuple[float, dict[str, Any]]]:
    """The training stage by TRL on the backend's own modules, a row at a time, with TRL's defaults: bfloat16 and layers computed again."""
    import transformers

    from benchmarks import against_trl

    student, teacher = backend._student, backend._teacher
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(workload.__file__).parent.parent / "opd" / "tiny" / "model")
    made = against_trl.trainer(student, teacher, tokenizer, out, again=True, bf16=device.startswith("cuda"))
    run = against_trl.side(made, group, 1, device)

    def in_bfloat16() -> tuple[float, dict[str, Any]]:
        # Where no `train()` prepares the model, nothing else would run it in half precision.
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            found = run()
        student.eval()
        return found

    return in_bfloat16


def agree(ours: Callable[[], Any], theirs: Callable[[], Any]) -> measuring.Row:
    """Errors of loss and gradient; bfloat16 sides agree to some percent."""
    loss, gradient = ours()
    gradient = {name: value.float().cpu() for name, value in gradient.items()}
    their_loss, their_gradient = theirs()
    difference = sum(float((gradient[name] - value.float().cpu()).square().sum()) for name, value in their_gradient.items())
    norm = sum(float(value.float().cpu().square().sum()) for value in their_gradient.values())
    return measuring.same((loss, their_loss), (difference / norm) ** 0.5, most=0.05)


def measured(name: str, run: Callable[[], Any], options: Any) -> measuring.Row:
    """Seconds and peak memory of one stage."""
    return {
        "stage": name,
        "seconds": measuring.seconds({name: run}, options.repeats, options.device)[name],
        "bytes": measuring.peak_bytes(run, options.device),
    }


def with_flops(rows: list[measuring.Row], config: Any, shape: Shape, peak: float) -> None:
    """Adds what each stage needs, its MFU, and the ratios to our training stage."""
    head = 4 * 2 * shape.n * shape.completion * config.text_config.hidden_size * config.text_config.vocab_size
    teacher = arithmetic.trunk(config, shape.crop or shape.prompt, shape.completion, shape.n)
    student = arithmetic.trunk(config, shape.prompt, shape.completion, shape.n, backward=True)
    needed = {
        "rollout": arithmetic.trunk(config, shape.prompt, shape.completion, shape.n) + head // 4,
        "teacher": teacher, "student": student, "head": head, "training stage": teacher + student + head,
    }  # fmt: skip
    by_name = {row["stage"]: row for row in rows}
    for name, value in needed.items():
        by_name[name] |= {"needed": value, "mfu": value / by_name[name]["seconds"] / (peak * 1e12)}
    decode = by_name["rollout"]["seconds"] - by_name["rollout, 1 token"]["seconds"]
    by_name["rollout"]["decode_tokens_per_second"] = shape.n * (shape.completion - 1) / decode
    stage = by_name["training stage"]
    for name in ("own rows", "TRL"):
        if name in by_name:
            by_name[name] |= measuring.ratios(stage, by_name[name])


if __name__ == "__main__":
    main()
