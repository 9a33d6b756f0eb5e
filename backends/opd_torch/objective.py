"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows. See
`opd.objective` for the mathematics.

Legend: N rows (completion tokens), D hidden width, V vocabulary, K support, C rows of a chunk.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q the
probabilities of student and teacher.

The gradient is computed in the forward, so the memory does not grow with N. It holds both policies'
logits [C, V], of which the student's become the gradient, and two more arrays (one where the
support is not the full vocabulary). On a CPU these two have only the rows of a block, so that
everything between the products of a chunk stays in the caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import groups
from opd.objective import LEAST_TAIL, LOG_RATIO_BOUND, Objective
from opd.types import STATISTICS, Alternatives, Group, TokenStatistics

CHUNK_BYTES = 64 * 2**20
"""Size of one float32 array [C, V] at the default chunk."""

LARGEST_DIFFERENCE = 80.0
"""Bound of the difference of two log-probabilities: its exponential is finite in float32, and that
of its negative nearly 0.
"""


@dataclass
class HeadResult:
    """Statistics [N] of every row, and the gradient of sum(weights * ratio * divergence) to hidden
    states [N, D] and head [V, D].

    With `top`, the most likely tokens and their log-probabilities of both policies, [N, top] each,
    best first.
    """

    student_logprobs: Tensor
    teacher_logprobs: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    ratio: Tensor
    divergence: Tensor
    hidden_gradient: Tensor | None = None
    head_gradient: Tensor | None = None
    student_top: tuple[Tensor, Tensor] | None = None
    teacher_top: tuple[Tensor, Tensor] | None = None

    def records(self, computed: Sequence[Group]) -> list[list[TokenStatistics]]:
        """One record for every completion of the `computed` groups, whose tokens are the rows."""
        statistics = torch.stack([getattr(self, name) for name in STATISTICS], 1).float()
        student_top, teacher_top = (
            None
            if top is None
            else Alternatives(top[0].int().cpu().numpy(), top[1].float().cpu().numpy())
            for top in (self.student_top, self.teacher_top)
        )
        return groups.records(computed, statistics.cpu().numpy(), student_top, teacher_top)


def default_chunk(vocabulary: int) -> int:
    """Rows of a chunk: as many as make a float32 array [C, V] of `CHUNK_BYTES`, at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def divergence_head(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    tokens: Tensor,
    sampler_logprobs: Tensor,
    weights: Tensor,
    objective: Objective,
    *,
    chunk: int,
    block_bytes: int = CHUNK_BYTES,
    gradient: bool = True,
    train_head: bool = True,
    top: int = 0,
) -> HeadResult:
    """Divergence of every row, from hidden states [N, D] and heads [V, D] of both policies.

    `tokens` [N] ids, `sampler_logprobs` [N] as recorded, `weights` [N]. Logits and everything
    computed from them are float32 (float64 where the hidden states are), whatever the inputs.
    `chunk` rows meet the head together; one array of the rows that pass together through everything
    else has at most `block_bytes`. Without `train_head` there is no gradient to the head.
    """
    count = len(tokens)
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    shared = teacher_head is student_head
    student_head = operand(student_head.detach())
    teacher_head = student_head if shared else operand(teacher_head.detach())
    sampler_logprobs, weights = sampler_logprobs.to(dtype), weights.to(dtype)
    statistics = student_hidden.new_empty(6, count, dtype=dtype)
    hidden_gradient = (
        student_hidden.new_empty(student_hidden.shape, dtype=dtype) if gradient else None
    )
    head_gradient = (
        student_hidden.new_zeros(student_head.shape, dtype=dtype)
        if gradient and train_head
        else None
    )
    tops: list[list[tuple[Tensor, Tensor]]] = [[], []]
    size = max(1, block_bytes // (4 * len(student_head)))
    with torch.no_grad():
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            h = operand(student_hidden[rows])
            logits = [head_logits(h, student_head), head_logits(teacher_hidden[rows], teacher_head)]
            inputs = (
                tokens[rows, None],
                sampler_logprobs[rows],
                weights[rows],
                *logits,
                statistics[:, rows].T,
            )
            for first in range(0, len(h), size):
                parts = [x[first : first + size] for x in inputs]
                for number, policy in enumerate(_block(objective, gradient, top, *parts)):
                    tops[number].append(policy)
            if hidden_gradient is not None:
                outer = logits[0]
                logits_gradient = outer.to(h.dtype)
                hidden_gradient[rows] = _product(logits_gradient, student_head)
                if head_gradient is not None:
                    _add_product(head_gradient, logits_gradient.T, h)
                del outer, logits_gradient
            del logits, inputs, parts  # or they would live on through the next chunk
    student_top, teacher_top = (_joined(policy) for policy in tops)
    columns = dict(zip(STATISTICS, statistics, strict=True))
    return HeadResult(
        **columns,
        hidden_gradient=hidden_gradient,
        head_gradient=head_gradient,
        student_top=student_top,
        teacher_top=teacher_top,
    )


def _block(
    objective: Objective,
    gradient: bool,
    top: int,
    tokens: Tensor,
    sampler: Tensor,
    weights: Tensor,
    student: Tensor,
    teacher: Tensor,
    statistics: Tensor,
) -> list[tuple[Tensor, Tensor]]:
    """Fills `statistics` [C, 6] and overwrites the `student` logits [C, V] with their gradient; the
    `teacher`'s are lost.

    Returns the `top` likeliest tokens of both policies and their log-probabilities, [C, top] each.
    """
    k, sampled = objective.support(student.shape[1]), objective.form == "sampled"
    full = k is None and not sampled
    ids = tokens if sampled or k is None else student.topk(k, sorted=False).indices
    t, q = _policy(teacher, objective.temperature)
    t_token, t_entropy = t.gather(1, tokens)[:, 0], -_dot(q, t)
    if not full:
        t_k, t_rest = t.gather(1, ids), _rest(q, ids) if objective.tail else None
        del q
    s, p = _policy(student, objective.temperature)
    s_token, s_entropy = s.gather(1, tokens)[:, 0], -_dot(p, s)
    tops: list[tuple[Tensor, Tensor]] = []
    if top:
        tops += (x.topk(min(top, x.shape[1])) for x in (s, t))
    log_ratio = (s_token - sampler).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = (
        torch.ones_like(s_token)
        if objective.ratio_clip is None
        else log_ratio.exp().clamp(max=objective.ratio_clip)
    )
    # Through s = z / T - logsumexp(z / T): ds_i/dz_j = (1[i = j] - p_j) / T.
    scale = (weights * ratio / objective.temperature)[:, None]
    if full:
        divergence = _in_place(s, t, p, q, objective.alpha)
        if gradient:
            s.addcmul_(p, s.sum(1, keepdim=True), value=-1).mul_(scale)
    else:
        # The derivative to the logits is `inside` [C, K] at `ids` [C, K], and `outside` [C, 1]
        # times p elsewhere.
        s_k = s.gather(1, ids)
        if sampled:
            divergence = s_token - t_token
            inside, outside = divergence[:, None] * -s_k.expm1(), -divergence[:, None]
        else:
            divergence, inside, outside = _on_support(
                s_k, t_k, _rest(p, ids) if objective.tail else None, t_rest, objective.alpha
            )
        if gradient:
            torch.mul(p, outside * scale, out=s).scatter_(1, ids, inside * scale)
    for column, values in zip(
        statistics.T, (s_token, t_token, s_entropy, t_entropy, ratio, divergence), strict=True
    ):
        column.copy_(values)
    return tops


def _policy(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities [C, V], which overwrite `logits`, and probabilities, with one exponential
    for both.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    logprobs = logits.sub_(logits.amax(1, keepdim=True))
    powers = logprobs.exp()
    total = powers.sum(1, keepdim=True)
    return logprobs.sub_(total.log()), powers.div_(total)


def _in_place(s: Tensor, t: Tensor, p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """Divergence [C] over the full vocabulary; its derivative [C, V] to s overwrites `s`, and `t`
    is lost.

    The derivative may lack a multiple of p, here and in `_between`: a softmax's backward cancels
    it, and its size would round off the rest.
    """
    if alpha == 0.0:
        divergence = _dot(q, t.sub_(s))
        torch.neg(q, out=s)
        return divergence
    if alpha == 1.0:
        divergence = _dot(p, s.sub_(t))
        s.mul_(p)
        return divergence
    # With d = t - s: s - m = -log(1 + alpha (exp(d) - 1)) and t - m = d + (s - m). Where d is
    # beyond the bound, p is nearly 0.
    d = s.neg_().add_(t).clamp_(max=LARGEST_DIFFERENCE)
    s_m = torch.expm1(d, out=t).mul_(alpha).log1p_().neg_()
    forward = _dot(q, d.add_(s_m))
    outer = torch.mul(p, s_m, out=s).mul_(1.0 - alpha)
    return outer.sum(1).add_(forward, alpha=alpha)


def _rest(p: Tensor, ids: Tensor) -> Tensor:
    """The sum of `p` [C, V] outside of `ids` [C, K], [C, 1]; `p` becomes 0 at the ids.

    A sum, and not 1 minus the others, which float32 cannot tell from 0 below 1e-7.
    """
    return p.scatter_(1, ids, 0.0).sum(1, keepdim=True)


def _on_support(
    s_k: Tensor, t_k: Tensor, s_rest: Tensor | None, t_rest: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence [C] over the support (`s_k`, `t_k` [C, K]) and its tail, if given (probabilities
    `s_rest`, `t_rest` [C, 1]).

    Also its derivative to the logits (over T): on the support [C, K], and elsewhere in units of the
    student's probability [C, 1]. Support and tail are a softmax too, so the only division by the
    tail's probability is of a part of it.
    """
    if s_rest is not None and t_rest is not None:
        divergence, inner = _between(_with_tail(s_k, s_rest), _with_tail(t_k, t_rest), alpha)
        # Where the tail is at its bound its derivative is 0, apart from the multiple of p that
        # `_between` leaves out.
        left_out = float(alpha == 1.0)
        rate = torch.where(
            s_rest > LEAST_TAIL, inner[:, -1:] / s_rest.clamp(min=LEAST_TAIL), -left_out
        )
        total = inner[:, :-1].sum(1, keepdim=True) + rate * s_rest
        return divergence, inner[:, :-1] - s_k.exp() * total, rate - total
    s_k, t_k = s_k - s_k.logsumexp(1, keepdim=True), t_k - t_k.logsumexp(1, keepdim=True)
    divergence, inner = _between(s_k, t_k, alpha)
    return divergence, inner - s_k.exp() * inner.sum(1, keepdim=True), torch.zeros_like(s_k[:, :1])


def _with_tail(logprobs: Tensor, rest: Tensor) -> Tensor:
    """`logprobs` [C, K] and a last bucket with the probability `rest` [C, 1]."""
    return torch.cat([logprobs, rest.clamp(min=LEAST_TAIL).log()], 1)


def _between(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence [C] of two log-distributions [C, K], and its derivative
    to s.
    """
    p, q = s.exp(), t.exp()
    if alpha == 0.0:
        return (q * (t - s)).sum(1), -q
    if alpha == 1.0:
        inner = p * (s - t)
        return inner.sum(1), inner
    d = (t - s).clamp(max=LARGEST_DIFFERENCE)  # as `_in_place`
    s_m = -(alpha * d.expm1()).log1p()
    inner = (1.0 - alpha) * p * s_m
    return inner.sum(1) + alpha * (q * (d + s_m)).sum(1), inner


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits [C, V] of `hidden` [C, D] and `head` [V, D], in float32 (float64 where they are)."""
    return _product(operand(hidden), operand(head).T)


def operand(x: Tensor) -> Tensor:
    """`x` in the precision of matrix products: bfloat16 stays on CUDA, where products of it return
    float32; else float32 or 64.
    """
    return x if x.dtype == torch.float64 or (x.is_cuda and x.dtype == torch.bfloat16) else x.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, also from operands of half precision, or in float64."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, which is float32 also where the operands have half precision."""
    if a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum [C] of x * y over the last axis, without the array of products."""
    return torch.bmm(x[:, None], y[:, :, None])[:, 0, 0]


def _joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Tokens and log-probabilities [N, top] of all chunks."""
    if not pieces:
        return None
    return torch.cat([ids for _, ids in pieces]), torch.cat([values for values, _ in pieces])
