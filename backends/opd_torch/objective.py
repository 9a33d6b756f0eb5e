"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows.

`opd.objective` has the mathematics.

Legend: N rows (completion tokens), D hidden width, V vocabulary, K support, C rows of a chunk.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q the
probabilities of student and teacher.

The forward also computes the gradient, so memory does not grow with N. A chunk holds both policies'
logits [C, V], of which the student's are overwritten by the gradient, and two more arrays [C, V]
(one for a support smaller than the vocabulary). On a CPU these two arrays have only the rows of a
block, so that everything between the matrix products stays in the processor's caches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opd import groups
from opd.memory import CHUNK_BYTES
from opd.objective import LEAST_TAIL, LOG_RATIO_BOUND, Objective
from opd.types import STATISTICS, Alternatives, Group, TokenStatistics

LARGEST_DIFFERENCE = 80.0
"""The bound of a difference d of two log-probabilities: in float32 exp(d) is finite and exp(-d)
nearly 0.
"""


@dataclass
class HeadResult:
    """The statistics [N] of all rows, and the gradient of sum(weights * ratio * divergence) with
    respect to the student's hidden states [N, D] and head [V, D].

    `student_top` and `teacher_top` are the most likely tokens and their log-probabilities, [N, top]
    each, best first; None if `top` was 0.
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
        """Cuts the rows into one record for each completion of the `computed` groups."""
        statistics = torch.stack([getattr(self, name) for name in STATISTICS], 1).float()
        student_top, teacher_top = (
            None
            if top is None
            else Alternatives(top[0].int().cpu().numpy(), top[1].float().cpu().numpy())
            for top in (self.student_top, self.teacher_top)
        )
        return groups.records(computed, statistics.cpu().numpy(), student_top, teacher_top)


def default_chunk(vocabulary: int) -> int:
    """The rows of a chunk: as many as fill a float32 array [C, V] of `CHUNK_BYTES`, at least 16."""
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
    """Computes the divergence of every row, from hidden states [N, D] and heads [V, D].

    `tokens` [N] are ids, `sampler_logprobs` [N] the log-probabilities recorded when they were
    sampled, `weights` [N] the rows' weights. Logits and everything computed from them are float32,
    or float64 for hidden states in float64. `chunk` rows are multiplied with the heads together;
    everything else runs on blocks of rows, whose arrays have at most `block_bytes` each. Without
    `gradient` no gradient is computed, and without `train_head` none for the head. With `top`, the
    `top` most likely tokens of both policies are returned too.
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
            del logits, inputs, parts  # otherwise they would stay alive during the next chunk
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
    """Fills `statistics` [C, 6], and overwrites the `student` logits [C, V] with the gradient and
    the `teacher` logits with intermediate values.

    Returns the `top` most likely tokens of both policies and their log-probabilities, [C, top]
    each.
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
        # The derivative with respect to the logits is `inside` [C, K] at `ids` [C, K], and p times
        # `outside` [C, 1] elsewhere.
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
    """Log-probabilities [C, V], which overwrite `logits`, and probabilities [C, V], both from one
    exponential per logit.
    """
    if temperature != 1.0:
        logits.div_(temperature)
    logprobs = logits.sub_(logits.amax(1, keepdim=True))
    powers = logprobs.exp()
    total = powers.sum(1, keepdim=True)
    return logprobs.sub_(total.log()), powers.div_(total)


def _in_place(s: Tensor, t: Tensor, p: Tensor, q: Tensor, alpha: float) -> Tensor:
    """The divergence [C] over the full vocabulary. Overwrites `s` with the derivative [C, V] with
    respect to s, and `t` with intermediate values.

    Here and in `_between` the derivative may leave out a multiple of p. The backward of the softmax
    cancels such a multiple, and adding it would only round off the other terms.
    """
    if alpha == 0.0:
        divergence = _dot(q, t.sub_(s))
        torch.neg(q, out=s)
        return divergence
    if alpha == 1.0:
        divergence = _dot(p, s.sub_(t))
        s.mul_(p)
        return divergence
    # With d = t - s: s - m = -log(1 + alpha (exp(d) - 1)) and t - m = d + (s - m). Where the bound
    # clamps d, p is nearly 0.
    d = s.neg_().add_(t).clamp_(max=LARGEST_DIFFERENCE)
    s_m = torch.expm1(d, out=t).mul_(alpha).log1p_().neg_()
    forward = _dot(q, d.add_(s_m))
    outer = torch.mul(p, s_m, out=s).mul_(1.0 - alpha)
    return outer.sum(1).add_(forward, alpha=alpha)


def _rest(p: Tensor, ids: Tensor) -> Tensor:
    """The sum [C, 1] of `p` [C, V] outside of `ids` [C, K]; sets `p` to 0 at the ids.

    In float32, 1 minus the sum inside would lose every rest below 1e-7.
    """
    return p.scatter_(1, ids, 0.0).sum(1, keepdim=True)


def _on_support(
    s_k: Tensor, t_k: Tensor, s_rest: Tensor | None, t_rest: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The divergence [C] over the support's log-probabilities `s_k`, `t_k` [C, K] and, if given,
    the tail's probabilities `s_rest`, `t_rest` [C, 1].

    Also returns the derivative with respect to the logits over T: on the support [C, K], and
    elsewhere [C, 1] as a factor of the student's probability. Support and tail together are a
    softmax, so only a fraction of the tail's probability is ever divided by that probability.
    """
    if s_rest is not None and t_rest is not None:
        divergence, inner = _between(_with_tail(s_k, s_rest), _with_tail(t_k, t_rest), alpha)
        # At LEAST_TAIL the tail's derivative is 0, up to the multiple of p that `_between` leaves
        # out.
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
    """Appends a bucket with the probability `rest` [C, 1] to `logprobs` [C, K]."""
    return torch.cat([logprobs, rest.clamp(min=LEAST_TAIL).log()], 1)


def _between(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """The generalised Jensen-Shannon divergence [C] of two log-distributions [C, K], and the
    derivative [C, K] with respect to s.
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
    """Logits [C, V] of `hidden` [C, D] and `head` [V, D], in float32 (float64 for float64)."""
    return _product(operand(hidden), operand(head).T)


def operand(x: Tensor) -> Tensor:
    """Converts `x` to the precision of matrix products.

    On CUDA bfloat16 stays as it is, because products of bfloat16 can return float32 there;
    float64 stays float64, everything else becomes float32.
    """
    return x if x.dtype == torch.float64 or (x.is_cuda and x.dtype == torch.bfloat16) else x.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 (from float32 or bfloat16) or in float64 (from float64)."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Adds a @ b to `total`, which is float32 for operands in bfloat16."""
    if a.dtype == torch.bfloat16:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a, b)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """The sum [C] of x * y over the last axis, without an array of the products."""
    return torch.bmm(x[:, None], y[:, :, None])[:, 0, 0]


def _joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Concatenates (log-probabilities, tokens) of all blocks; returns tokens and log-probabilities
    [N, top], or None without any.
    """
    if not pieces:
        return None
    return torch.cat([ids for _, ids in pieces]), torch.cat([values for values, _ in pieces])
