"""What does the divergence kernel cost against TRL's chunked kernel, Liger's JSD and autograd?

    python -m benchmarks.head [--backend torch|mlx] [--device cpu|cuda]
                              [--rows 1024 --hidden 512 --vocabulary 151936] [--json] [--quick]

The benchmark compares matrix products, time and peak memory. One call takes hidden states [N, D]
and heads [V, D] of both policies, and computes the loss and the loss's gradient with respect to
the student's hidden states and head. A unit is one product of [N, D] with [D, V]: 2 N D V FLOPs.
The least is 4 units, two in the forward and two for the gradients; `bound` is a peer's units over
4. A peer that is not installed is left out, with a message on stderr. Liger compiles chunks on a
GPU only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import measuring
from benchmarks.against_rows import FULL, compared, divergence
from opd_torch.objective import default_chunk, divergence_head

Side = Callable[[], tuple[float, dict[str, Any]]]


def torch_sides(
    student: Tensor, student_head: Tensor, teacher: Tensor, teacher_head: Tensor
) -> dict[str, Side]:
    """Functions that compute loss and gradients on torch, by side.

    Every side detaches the inputs, so no side keeps the graph of another.
    """
    count, vocabulary = len(student), len(student_head)
    tokens = torch.zeros(count, dtype=torch.int64, device=student.device)
    weights = torch.full((count,), 1 / count, device=student.device)

    def ours() -> tuple[float, dict[str, Any]]:
        result = divergence_head(
            student,
            student_head,
            teacher,
            teacher_head,
            tokens,
            torch.zeros_like(weights),
            weights,
            FULL,
            chunk=default_chunk(vocabulary),
        )
        return float((weights * result.divergence).sum()), {
            "hidden": result.hidden_gradient,
            "head": result.head_gradient,
        }

    def by(loss_of: Callable[[Tensor, Tensor], Tensor]) -> Side:
        def side() -> tuple[float, dict[str, Any]]:
            inputs = student.detach().requires_grad_(), student_head.detach().requires_grad_()
            loss = loss_of(*inputs)
            loss.backward()
            return float(loss.detach()), {"hidden": inputs[0].grad, "head": inputs[1].grad}

        return side

    def plain(hidden: Tensor, head: Tensor) -> Tensor:
        with torch.no_grad():
            t = (teacher @ teacher_head.T).float().log_softmax(-1)
        return divergence((hidden @ head.T).float().log_softmax(-1), t).mean()

    sides = {"ours": ours, "naive autograd": by(plain)}
    if find_spec("trl"):
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        def trl(hidden: Tensor, head: Tensor) -> Tensor:
            value: Tensor = ChunkedDivergenceFunction.apply(
                hidden, head, None, teacher, teacher_head, None, FULL.alpha, 1.0
            )[0].mean()
            return value

        sides["TRL"] = by(trl)
    else:
        print("trl is not installed: left out", file=sys.stderr)
    if find_spec("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        kernel = LigerFusedLinearJSDLoss(
            weight_hard_loss=0.0, weight_soft_loss=1.0, beta=FULL.alpha, compiled=student.is_cuda
        )

        def liger(hidden: Tensor, head: Tensor) -> Tensor:
            value: Tensor = kernel(hidden, head, teacher, teacher_head, tokens)
            return value

        sides["Liger"] = by(liger)
    else:
        print("liger-kernel is not installed: left out", file=sys.stderr)
    return sides


def mlx_sides(arrays: list[np.ndarray[Any, Any]]) -> dict[str, Side]:
    """Functions that compute loss and gradients on MLX, where autograd is the only peer."""
    import mlx.core as mx

    from opd_mlx import objective
    from opd_mlx.device import this_device

    student, student_head, teacher, teacher_head = (mx.array(value) for value in arrays)
    count = len(student)
    tokens, weights = mx.zeros(count, dtype=mx.int32), mx.full(count, 1 / count)
    mx.eval(student, student_head, teacher, teacher_head, tokens, weights)

    def ours() -> tuple[float, dict[str, Any]]:
        result = objective.divergence_head(
            student,
            student_head,
            teacher,
            teacher_head,
            tokens,
            mx.zeros(count),
            weights,
            FULL,
            chunk=objective.default_chunk(len(student_head)),
            block_bytes=this_device().head_block_bytes,
        )
        gradient = {"hidden": result.hidden_gradient, "head": result.head_gradient}
        mx.eval(gradient)
        return (weights * result.divergence).sum().item(), gradient

    def plain(hidden: Any, head: Any) -> Any:
        s, t = (
            logits - mx.logsumexp(logits, -1, keepdims=True)
            for logits in (hidden @ head.T, teacher @ teacher_head.T)
        )
        m = mx.logaddexp(s, t) + np.log(0.5)
        return (0.5 * (mx.exp(s) * (s - m) + mx.exp(t) * (t - m)).sum(-1)).mean()

    def naive() -> tuple[float, dict[str, Any]]:
        loss, (hidden, head) = mx.value_and_grad(plain, argnums=[0, 1])(student, student_head)
        mx.eval(loss, hidden, head)
        return loss.item(), {"hidden": hidden, "head": head}

    return {"ours": ours, "naive autograd": naive}


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--backend", choices=("torch", "mlx"), default="torch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=151936)
    options = parser.parse_args()
    count, width, vocabulary = (
        (192, 64, 4096) if options.quick else (options.rows, options.hidden, options.vocabulary)
    )
    rng = np.random.default_rng(0)
    arrays = [
        rng.standard_normal(size).astype(np.float32)
        for size in ((count, width), (vocabulary, width)) * 2
    ]
    arrays = [value / np.sqrt(width) * 2 if len(value) == vocabulary else value for value in arrays]
    if options.backend == "mlx":
        sides, device = mlx_sides([value.astype(np.float32) for value in arrays]), "mlx"
    else:
        device = options.device
        sides = torch_sides(*(torch.from_numpy(value).float().to(device) for value in arrays))
    unit = 2 * count * width * vocabulary
    rows = compared(sides, options, device, 4 * unit)
    for row in rows:
        row |= {"units": row["flops"] / unit} if "flops" in row else {}
        row["copies"] = row["bytes"] / (4 * count * vocabulary)
    about = {
        "device": measuring.device_name(device),
        "backend": options.backend,
        "shape": f"N {count}, D {width}, V {vocabulary}",
    }
    measuring.report(
        options, "head", rows, **about, versions=measuring.versions("trl", "liger-kernel", "mlx")
    )


if __name__ == "__main__":
    main()
