"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows. See `opd.objective` for the maths.

Legend: N rows (completion tokens), D hidden width, V vocabulary, K support, C rows of a chunk.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q the probabilities of student and teacher.

The gradient is made in the forward, and every chunk is evaluated before the next is begun, outside of any gradient trace: so memory
does not grow with the rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from opd.objective import LOG_RATIO_BOUND, TAIL_BOUND, Objective

CHUNK_BYTES = 64 * 1024**2
"""Size of one [C, V] buffer; about ten of them are alive at a time."""


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
        part, slope = _chunk(student @ heads[0].T, teacher @ heads[1].T, tokens[rows], sampler_logprobs[rows], objective, top)
        if gradient:
            slope = slope * (weights[rows] * part["ratio"] / objective.temperature)[:, None]
            part["hidden_gradient"] = slope @ heads[0]
            if head_gradient is not None:
                head_gradient = mx.addmm(head_gradient, slope.T, student)
                mx.eval(head_gradient)
        del slope
        mx.eval(part)
        parts.append(part)
    return HeadResult(**{name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}, head_gradient=head_gradient)


def _chunk(
    student: mx.array, teacher: mx.array, tokens: mx.array, sampler: mx.array, objective: Objective, top: int
) -> tuple[dict[str, mx.array], mx.array]:
    """Results by name for logits [C, V], and the gradient [C, V] of the divergence to the student's logits / temperature."""
    part: dict[str, mx.array] = {}
    s = _log_softmax(student, objective.temperature)
    t = _log_softmax(teacher, objective.temperature)
    tokens = tokens.astype(mx.int32)[:, None]
    for policy, logprobs in (("student", s), ("teacher", t)):
        part[f"{policy}_logprobs"] = mx.take_along_axis(logprobs, tokens, -1)[:, 0]
        part[f"{policy}_entropy"] = -(mx.exp(logprobs) * logprobs).sum(-1)
        if top:
            ids = mx.argpartition(-logprobs, top - 1, axis=-1)[:, :top] if top < logprobs.shape[-1] else mx.argsort(-logprobs, axis=-1)
            ids = mx.take_along_axis(ids, mx.argsort(-mx.take_along_axis(logprobs, ids, -1), axis=-1), -1)
            part[f"{policy}_top_tokens"] = ids.astype(mx.int32)
            part[f"{policy}_top_logprobs"] = mx.take_along_axis(logprobs, ids, -1)
    part["ratio"] = _importance_ratio(part["student_logprobs"], sampler, objective.ratio_clip)
    k = objective.support(s.shape[-1])
    if objective.form == "sampled":
        part["divergence"] = part["student_logprobs"] - part["teacher_logprobs"]
        return part, _scattered(s, tokens, part["divergence"][:, None])
    if k is None:
        part["divergence"], outer = _between(s, t, objective.alpha)
        return part, outer - mx.exp(s) * outer.sum(-1, keepdims=True)
    ids = mx.argpartition(-s, k - 1, axis=-1)[:, :k]
    s_k, t_k = mx.take_along_axis(s, ids, -1), mx.take_along_axis(t, ids, -1)
    part["divergence"], at_support = _on_support(s_k, t_k, objective)
    return part, _scattered(s, ids, at_support)


def _scattered(s: mx.array, ids: mx.array, outer: mx.array) -> mx.array:
    """Gradient [C, V] to the logits of a function whose derivative to s is `outer` [C, K] at `ids`, and 0 elsewhere.

    Through s = z - logsumexp(z): ds_i/dz_j = 1[i = j] - p_j.
    """
    dense = -mx.exp(s) * outer.sum(-1, keepdims=True)
    return mx.put_along_axis(dense, ids, mx.take_along_axis(dense, ids, -1) + outer, axis=-1)


def _on_support(s: mx.array, t: mx.array, objective: Objective) -> tuple[mx.array, mx.array]:
    """Divergence [C] over the support's log-probabilities [C, K] (and a tail), and its derivative to s."""
    s_mass, t_mass = mx.logsumexp(s, -1, keepdims=True), mx.logsumexp(t, -1, keepdims=True)
    if not objective.tail:
        divergence, inner = _between(s - s_mass, t - t_mass, objective.alpha)
        return divergence, inner - mx.exp(s - s_mass) * inner.sum(-1, keepdims=True)
    divergence, inner = _between(_with_tail(s, s_mass), _with_tail(t, t_mass), objective.alpha)
    # d tail / d s_i = -p_i / (1 - mass), and 0 where the bound holds the mass still.
    slope = mx.where(s_mass < TAIL_BOUND, 1.0 / mx.expm1(mx.minimum(s_mass, TAIL_BOUND)), 0.0)
    return divergence, inner[:, :-1] + inner[:, -1:] * slope * mx.exp(s)


def _with_tail(logprobs: mx.array, mass: mx.array) -> mx.array:
    """`logprobs` [C, K] and a last bucket with what `mass` [C, 1], their logsumexp, leaves."""
    return mx.concatenate([logprobs, mx.log(-mx.expm1(mx.minimum(mass, TAIL_BOUND)))], axis=-1)


def _between(s: mx.array, t: mx.array, alpha: float) -> tuple[mx.array, mx.array]:
    """Generalised Jensen-Shannon divergence [C] of two log-distributions [C, K], and its derivative to s."""
    p, q = mx.exp(s), mx.exp(t)
    if alpha == 0.0:
        return (q * (t - s)).sum(-1), -q
    if alpha == 1.0:
        return (p * (s - t)).sum(-1), p * (s - t + 1.0)
    m = mx.logaddexp(s + mx.log(mx.array(1.0 - alpha, s.dtype)), t + mx.log(mx.array(alpha, s.dtype)))
    inner = (1.0 - alpha) * p * (s - m)
    return (inner + alpha * q * (t - m)).sum(-1), inner


def _importance_ratio(student: mx.array, sampler: mx.array, clip: float | None) -> mx.array:
    """Ratio [C] of the student's to the sampler's probability of each token, bounded above by `clip`; 1 without one."""
    if clip is None:
        return mx.ones_like(student)
    return mx.minimum(mx.exp(mx.clip(student - sampler, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)), clip)


def _log_softmax(logits: mx.array, temperature: float) -> mx.array:
    logits = logits if temperature == 1.0 else logits / temperature
    return logits - mx.logsumexp(logits, -1, keepdims=True)
