"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows. See `opd.objective` for the maths.

Legend: N rows (completion tokens), D hidden width, V vocabulary, K support, C rows of a chunk.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q the probabilities of student and teacher.

The gradient is made in the forward, and every chunk is evaluated before the next is begun, outside of any gradient trace: so memory
does not grow with the rows. On a CPU all between the products of a chunk goes block by block, whose rows stay in the caches.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from opd.objective import LEAST_TAIL, LOG_RATIO_BOUND, Objective
from opd_mlx.kernels.exponentials import exponential, log_softmax

CHUNK_BYTES = 64 * 1024**2
"""Size of one [C, V] buffer; at most nine of them are alive at a time, or four where blocks are smaller than chunks."""

BLOCK_BYTES = 2**20 if mx.default_device() == mx.cpu else CHUNK_BYTES
"""Size of one array of the rows that go together through all but the products."""


@dataclass(frozen=True)
class HeadResult:
    """Statistics [N] of every row, and the gradient of sum(weights * ratio * divergence) to hidden states [N, D] and head [V, D].

    With `top`, the most likely tokens and their log-probabilities of both policies, [N, top] each, best first.
    """

    student_logprobs: mx.array
    teacher_logprobs: mx.array
    student_entropy: mx.array
    teacher_entropy: mx.array
    ratio: mx.array
    divergence: mx.array
    hidden_gradient: mx.array | None = None
    head_gradient: mx.array | None = None
    student_top_tokens: mx.array | None = None
    student_top_logprobs: mx.array | None = None
    teacher_top_tokens: mx.array | None = None
    teacher_top_logprobs: mx.array | None = None


def default_chunk(vocabulary: int) -> int:
    """Rows whose logits fill about CHUNK_BYTES; at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


def divergence_head(
    student_hidden: mx.array,
    student_head: mx.array,
    teacher_hidden: mx.array,
    teacher_head: mx.array,
    tokens: mx.array,
    sampler_logprobs: mx.array,
    weights: mx.array,
    objective: Objective,
    *,
    chunk: int,
    gradient: bool = True,
    train_head: bool = True,
    top: int = 0,
) -> HeadResult:
    """Statistics and gradients of N rows: hidden states [N, D], heads [V, D], `tokens`, `sampler_logprobs` and `weights` [N].

    Everything after the hidden states is float32, or float64 where they are. Without `train_head` there is no gradient to the head.
    """
    dtype = mx.float64 if student_hidden.dtype == mx.float64 else mx.float32
    shared = teacher_head is student_head
    student_head = student_head.astype(dtype)
    heads = student_head, student_head if shared else teacher_head.astype(dtype)
    parts: list[dict[str, mx.array]] = []
    head_gradient = mx.zeros(student_head.shape, dtype) if gradient and train_head else None
    for start in range(0, len(tokens), chunk):
        rows = slice(start, start + chunk)
        student, teacher = student_hidden[rows].astype(dtype), teacher_hidden[rows].astype(dtype)
        logits = [student @ heads[0].T, teacher @ heads[1].T]
        part, slope = _chunk(logits, tokens[rows], sampler_logprobs[rows], weights[rows], objective, gradient, top)
        if slope is not None:
            part["hidden_gradient"] = slope @ heads[0]
            if head_gradient is not None:
                head_gradient = mx.addmm(head_gradient, slope.T, student)
                mx.eval(head_gradient)
        del slope
        mx.eval(part)
        parts.append(part)
    return HeadResult(**_joined(parts), head_gradient=head_gradient)


def _chunk(
    logits: list[mx.array],
    tokens: mx.array,
    sampler: mx.array,
    weights: mx.array,
    objective: Objective,
    gradient: bool,
    top: int,
) -> tuple[dict[str, mx.array], mx.array | None]:
    """Results by name for `logits` [C, V] of student and teacher, which are taken apart, and the weighted gradient [C, V] to the student's,
    unless without `gradient`.
    """
    count, size = len(tokens), max(1, BLOCK_BYTES // (4 * logits[0].shape[-1]))
    parts, slopes = [], []
    if count > size:
        mx.eval(logits)
    for start in range(0, count, size):
        rows = slice(start, start + size)
        part, slope = _block([x[rows] for x in logits] if count > size else logits, tokens[rows], sampler[rows], objective, top)
        if gradient:
            slopes.append(slope * (weights[rows] * part["ratio"] / objective.temperature)[:, None])
        del slope
        if count > size:
            mx.eval(part, slopes)
        parts.append(part)
    logits.clear()
    return _joined(parts), mx.concatenate(slopes) if gradient else None


def _joined(parts: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}


def _block(
    logits: list[mx.array], tokens: mx.array, sampler: mx.array, objective: Objective, top: int
) -> tuple[dict[str, mx.array], mx.array]:
    """Results by name for `logits` [C, V] of student and teacher, and the gradient [C, V] of the divergence to the student's logits /
    temperature.

    Takes `logits` apart, and evaluates one policy before the other begins, so that no array lives longer than it is needed.
    """
    part: dict[str, mx.array] = {}
    tokens = tokens.astype(mx.int32)[:, None]
    k, sampled = objective.support(logits[0].shape[-1]), objective.form == "sampled"
    s, p = _policy(part, "student", logits, tokens, objective.temperature, top)
    if not sampled and k is not None:
        ids = mx.argpartition(-s, k - 1, axis=-1)[:, :k]
        s_k, s_rest = mx.take_along_axis(s, ids, -1), _rest(p, ids)
        mx.eval(part, ids, s_k, s_rest)
        del s
    t, q = _policy(part, "teacher", logits, tokens, objective.temperature, top)
    part["ratio"] = _importance_ratio(part["student_logprobs"], sampler, objective.ratio_clip)
    if sampled:
        divergence = part["divergence"] = part["student_logprobs"] - part["teacher_logprobs"]
        inside = (divergence * -mx.expm1(part["student_logprobs"]))[:, None]
        return part, mx.put_along_axis(-divergence[:, None] * p, tokens, inside, axis=-1)
    if k is None:
        mx.eval(part)
        part["divergence"], outer = _between(s, t, p, q, objective.alpha)
        return part, outer - p * outer.sum(-1, keepdims=True)
    part["divergence"], inside, outside = _on_support(s_k, mx.take_along_axis(t, ids, -1), s_rest, _rest(q, ids), objective)
    mx.eval(part, inside, outside)
    return part, mx.put_along_axis(outside * p, ids, inside, axis=-1)


def _policy(
    part: dict[str, mx.array], policy: str, logits: list[mx.array], tokens: mx.array, temperature: float, top: int
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and probabilities [C, V] from the first of `logits`, which is taken; results by name go to `part`."""
    logprobs, probabilities = log_softmax(logits.pop(0) if temperature == 1.0 else logits.pop(0) / temperature)
    mx.eval(logprobs, probabilities)
    part[f"{policy}_logprobs"] = mx.take_along_axis(logprobs, tokens, -1)[:, 0]
    part[f"{policy}_entropy"] = -(probabilities * logprobs).sum(-1)
    if top:
        ids = mx.argpartition(-logprobs, top - 1, axis=-1)[:, :top] if top < logprobs.shape[-1] else mx.argsort(-logprobs, axis=-1)
        ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logprobs, ids, -1), axis=-1), -1)
        part[f"{policy}_top_tokens"] = ids.astype(mx.int32)
        part[f"{policy}_top_logprobs"] = mx.take_along_axis(logprobs, ids, -1)
    return logprobs, probabilities


def _rest(p: mx.array, ids: mx.array) -> mx.array:
    """What `p` [C, V] has outside of `ids` [C, K], [C, 1].

    Summed, and not what the others leave of 1: of that, float32 knows nothing below 1e-7.
    """
    return mx.put_along_axis(p, ids, mx.zeros(ids.shape, p.dtype), axis=-1).sum(-1, keepdims=True)


def _on_support(s: mx.array, t: mx.array, s_rest: mx.array, t_rest: mx.array, objective: Objective) -> tuple[mx.array, mx.array, mx.array]:
    """Divergence [C] over the support's log-probabilities [C, K] and its tail (of probabilities [C, 1]), and its derivative to the logits
    (over T): on the support [C, K], and elsewhere in units of the student's probability [C, 1].

    Support and tail are a softmax too, so nothing is divided by what the tail is but a part of it.
    """
    if not objective.tail:
        s, t = s - mx.logsumexp(s, -1, keepdims=True), t - mx.logsumexp(t, -1, keepdims=True)
        p = exponential(s)
        divergence, inner = _between(s, t, p, exponential(t), objective.alpha)
        return divergence, inner - p * inner.sum(-1, keepdims=True), mx.zeros_like(s_rest)
    s_rest, t_rest = (mx.maximum(rest, LEAST_TAIL) for rest in (s_rest, t_rest))
    p, q = (mx.concatenate([exponential(x), rest], axis=-1) for x, rest in ((s, s_rest), (t, t_rest)))
    s, t = (mx.concatenate([x, mx.log(rest)], axis=-1) for x, rest in ((s, s_rest), (t, t_rest)))
    divergence, inner = _between(s, t, p, q, objective.alpha)
    # Where the bound holds the tail still, nothing moves it; but of p, which `_between` leaves out, the tail's part is missing then.
    left_out = float(objective.alpha == 1.0)
    rate = mx.where(s_rest > LEAST_TAIL, inner[:, -1:] / s_rest, -left_out)
    total = inner[:, :-1].sum(-1, keepdims=True) + rate * s_rest
    return divergence, inner[:, :-1] - p[:, :-1] * total, rate - total


def _between(s: mx.array, t: mx.array, p: mx.array, q: mx.array, alpha: float) -> tuple[mx.array, mx.array]:
    """Generalised Jensen-Shannon divergence [C] of two distributions [C, K], given with their logarithms, and its derivative to s.

    The derivative may lack a multiple of p: no softmax lets it through, and beside it the rest would be rounded.
    """
    if alpha == 0.0:
        return (q * (t - s)).sum(-1), -q
    if alpha == 1.0:
        inner = p * (s - t)
        return inner.sum(-1), inner
    # Through the difference, which is exact where the two are close: s - m = log(p / m) and p - m = -alpha (q - p), and so for t. Where one
    # of the two is next to nothing beside m, its logarithm has a bound, and weighs as little.
    numbers = mx.finfo(p.dtype)
    difference = q - p
    difference = difference / mx.maximum(p + alpha * difference, numbers.smallest_normal)
    s_m, t_m = (mx.log1p(mx.maximum(share * difference, numbers.eps / 2 - 1)) for share in (-alpha, 1.0 - alpha))
    inner = (1.0 - alpha) * p * s_m
    return (inner + alpha * q * t_m).sum(-1), inner


def _importance_ratio(student: mx.array, sampler: mx.array, clip: float | None) -> mx.array:
    """Ratio [C] of the student's to the sampler's probability of each token, bounded above by `clip`; 1 without one."""
    if clip is None:
        return mx.ones_like(student)
    return mx.minimum(mx.exp(mx.clip(student - sampler, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)), clip)
