"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows. See `opd.objective` for the maths.

Legend: N rows (completion tokens), D hidden width, V vocabulary, K support, C rows of a chunk.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q the probabilities of student and teacher.

The gradient is made in the forward, so nothing is kept for a backward: at most four arrays [C, V] live at a time (three where the support
is not the full vocabulary), whatever N is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opd.objective import LEAST_TAIL, LOG_RATIO_BOUND, Objective

CHUNK_BYTES = 64 * 2**20
"""Size of one float32 array [C, V] at the default chunk."""

LARGEST_DIFFERENCE = 80.0
"""Of two log-probabilities: exp of it is still finite in float32, and exp of its negative is next to nothing."""

STATISTICS = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "ratio", "divergence")


@dataclass
class HeadResult:
    """Statistics [N] of every row, and the gradient of sum(weights * ratio * divergence) to hidden states [N, D] and head [V, D].

    With `top`, the most likely tokens and their log-probabilities of both policies, [N, top] each, best first.
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


def default_chunk(vocabulary: int) -> int:
    """Rows of a chunk: as many as make a float32 array [C, V] of 64 MiB, at least 16."""
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
    gradient: bool = True,
    train_head: bool = True,
    top: int = 0,
) -> HeadResult:
    """Divergence of every row, from hidden states [N, D] and heads [V, D] of both policies.

    `tokens` [N] ids, `sampler_logprobs` [N] as recorded, `weights` [N]. Logits and all that follows are float32 (float64 where the
    hidden states are), whatever the inputs. Without `train_head` there is no gradient to the head.
    """
    count, vocabulary = len(tokens), student_head.shape[0]
    dtype = torch.float64 if student_hidden.dtype == torch.float64 else torch.float32
    shared = teacher_head is student_head
    student_head = operand(student_head.detach())
    teacher_head = student_head if shared else operand(teacher_head.detach())
    sampler_logprobs, weights = sampler_logprobs.to(dtype), weights.to(dtype)
    statistics = student_hidden.new_empty(6, count, dtype=dtype)
    hidden_gradient = student_hidden.new_empty(student_hidden.shape, dtype=dtype) if gradient else None
    head_gradient = student_hidden.new_zeros(student_head.shape, dtype=dtype) if gradient and train_head else None
    tops: list[list[tuple[Tensor, Tensor]]] = [[], []]
    with torch.no_grad():
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            h = operand(student_hidden[rows])
            # In a list, which `_chunk` empties: no other name may keep these two arrays [C, V] alive.
            policies = [
                _log_probabilities(h, student_head, objective.temperature),
                _log_probabilities(teacher_hidden[rows], teacher_head, objective.temperature),
            ]
            for number in range(2 if top else 0):
                tops[number].append(policies[number].topk(min(top, vocabulary)))
            outer = _chunk(policies, tokens[rows, None], sampler_logprobs[rows], weights[rows], objective, statistics[:, rows], gradient)
            if outer is not None and hidden_gradient is not None:
                hidden_gradient[rows] = _product(outer.to(h.dtype), student_head)
                if head_gradient is not None:
                    head_gradient.addmm_(outer.T, h.to(dtype))
            del outer  # or it would live on through the next chunk
    student_top, teacher_top = (_joined(policy) for policy in tops)
    columns = dict(zip(STATISTICS, statistics, strict=True))
    return HeadResult(
        **columns, hidden_gradient=hidden_gradient, head_gradient=head_gradient, student_top=student_top, teacher_top=teacher_top
    )


def _chunk(
    policies: list[Tensor], tokens: Tensor, sampler: Tensor, weights: Tensor, objective: Objective, statistics: Tensor, gradient: bool
) -> Tensor | None:
    """Fills `statistics` [6, C]; returns the gradient [C, V] to the student's raw logits.

    Takes `policies` apart, so that the two arrays [C, V] in it can be overwritten and freed on the way.
    """
    t, s = policies.pop(), policies.pop()
    s_token, t_token = s.gather(1, tokens)[:, 0], t.gather(1, tokens)[:, 0]
    log_ratio = (s_token - sampler).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    ratio = torch.ones_like(s_token) if objective.ratio_clip is None else log_ratio.exp().clamp(max=objective.ratio_clip)
    k, sampled = objective.support(s.shape[1]), objective.form == "sampled"
    some = sampled or k is not None
    if sampled:
        s_k, ids = s_token[:, None], tokens
    elif k is not None:
        s_k, ids = s.topk(k, sorted=False)
    q = t.exp()
    t_entropy = -_dot(q, t)
    if some:
        t_k, t_rest = t.gather(1, ids), _rest(q, ids)
        del q, t
    p = s.exp()
    s_entropy = -_dot(p, s)
    if some:
        del s
        # The derivative to the logits is `inside` [C, K] at `ids` [C, K], and `outside` [C, 1] times p elsewhere.
        if sampled:
            divergence = s_token - t_token
            inside, outside = divergence[:, None] * -s_k.expm1(), -divergence[:, None]
        else:
            divergence, inside, outside = _on_support(s_k, t_k, _rest(p, ids), t_rest, objective)
    else:
        divergence, outer = _in_place(s, t, p, q, objective.alpha)
        del s, t, q
    for row, values in zip(statistics, (s_token, t_token, s_entropy, t_entropy, ratio, divergence), strict=True):
        row.copy_(values)
    if not gradient:
        return None
    # Through s = z / T - logsumexp(z / T): ds_i/dz_j = (1[i = j] - p_j) / T.
    scale = (weights * ratio / objective.temperature)[:, None]
    if not some:
        return outer.addcmul_(p, outer.sum(1, keepdim=True), value=-1).mul_(scale)
    return p.mul_(outside * scale).scatter_(1, ids, inside * scale)


def _in_place(s: Tensor, t: Tensor, p: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Divergence [C] over the full vocabulary and its derivative [C, V] to s; overwrites `s`, `t` and `q`."""
    if alpha == 0.0:
        return _dot(q, t.sub_(s)), q.neg_()
    if alpha == 1.0:
        divergence = _dot(p, s.sub_(t))
        return divergence, torch.mul(p, s.add_(1.0), out=q)
    # With d = t - s: s - m = -log(1 + alpha (exp(d) - 1)) and t - m = d + (s - m). Where d is beyond the bound, p is nothing.
    d = s.neg_().add_(t).clamp_(max=LARGEST_DIFFERENCE)
    s_m = torch.expm1(d, out=t).mul_(alpha).log1p_().neg_()
    forward = _dot(q, d.add_(s_m))
    outer = torch.mul(p, s_m, out=q).mul_(1.0 - alpha)
    return outer.sum(1).add_(forward, alpha=alpha), outer


def _rest(p: Tensor, ids: Tensor) -> Tensor:
    """What `p` [C, V] has outside of `ids` [C, K], [C, 1]; overwrites `p` there.

    Summed, and not what the others leave of 1: of that, float32 knows nothing below 1e-7.
    """
    return p.scatter_(1, ids, 0.0).sum(1, keepdim=True)


def _on_support(s_k: Tensor, t_k: Tensor, s_rest: Tensor, t_rest: Tensor, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence [C] over the support (`s_k`, `t_k` [C, K]) and its tail (of probabilities `s_rest`, `t_rest` [C, 1]), and its derivative
    to the logits (over T): on the support [C, K], and elsewhere in units of the student's probability [C, 1].

    Support and tail are a softmax too, so nothing is divided by what the tail is but a part of it.
    """
    if objective.tail:
        divergence, inner = _between(_with_tail(s_k, s_rest), _with_tail(t_k, t_rest), objective.alpha)
        # Where the bound holds the tail still, nothing moves it.
        of_tail = torch.where(s_rest > LEAST_TAIL, inner[:, -1:], torch.zeros_like(s_rest))
        total = inner[:, :-1].sum(1, keepdim=True) + of_tail
        return divergence, inner[:, :-1] - s_k.exp() * total, of_tail / s_rest.clamp(min=LEAST_TAIL) - total
    s_k, t_k = s_k - s_k.logsumexp(1, keepdim=True), t_k - t_k.logsumexp(1, keepdim=True)
    divergence, inner = _between(s_k, t_k, objective.alpha)
    return divergence, inner - s_k.exp() * inner.sum(1, keepdim=True), torch.zeros_like(s_rest)


def _with_tail(logprobs: Tensor, rest: Tensor) -> Tensor:
    """`logprobs` [C, K] and a last bucket with the probability `rest` [C, 1]."""
    return torch.cat([logprobs, rest.clamp(min=LEAST_TAIL).log()], 1)


def _between(s: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence [C] of two log-distributions [C, K], and its derivative to s."""
    p, q = s.exp(), t.exp()
    if alpha == 0.0:
        return (q * (t - s)).sum(1), -q
    if alpha == 1.0:
        return (p * (s - t)).sum(1), p * (s - t + 1.0)
    d = (t - s).clamp(max=LARGEST_DIFFERENCE)  # as `_in_place`
    s_m = -(alpha * d.expm1()).log1p()
    inner = (1.0 - alpha) * p * s_m
    return inner.sum(1) + alpha * (q * (d + s_m)).sum(1), inner


def head_logits(hidden: Tensor, head: Tensor) -> Tensor:
    """Logits [C, V] of `hidden` [C, D] and `head` [V, D], in float32 (float64 where they are)."""
    return _product(operand(hidden), operand(head).T)


def _log_probabilities(hidden: Tensor, head: Tensor, temperature: float) -> Tensor:
    """log_softmax of the logits over temperature [C, V], in place."""
    logits = head_logits(hidden, head)
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(1, keepdim=True))


def operand(x: Tensor) -> Tensor:
    """`x` as a matrix product takes it: half precision stays on CUDA, where products can accumulate in and return float32."""
    return x if x.dtype == torch.float64 or (x.is_cuda and x.dtype == torch.bfloat16) else x.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 from operands of half precision too, or in float64."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype == torch.bfloat16 else a @ b


def _dot(x: Tensor, y: Tensor) -> Tensor:
    """Sum [C] of x * y over the last axis, without the array of products."""
    return torch.bmm(x[:, None], y[:, :, None])[:, 0, 0]


def _joined(pieces: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor] | None:
    """Tokens and log-probabilities [N, top] of all chunks."""
    if not pieces:
        return None
    return torch.cat([ids for _, ids in pieces]), torch.cat([values for values, _ in pieces])
