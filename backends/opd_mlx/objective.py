"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows.

The gradient is made in the forward, and every chunk is evaluated before the next is begun, outside
of any gradient trace: so memory does not grow with the rows. Everything between the products of a
chunk can go block by block, in blocks that stay in a CPU's caches. `opd.objective` has the
mathematics.

Legend: N rows (completion tokens), D hidden width, V vocabulary, K support, C rows of a chunk.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q the
probabilities of student and teacher.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from opd import groups
from opd.objective import LEAST_TAIL, LOG_RATIO_BOUND, Objective
from opd.types import STATISTICS, Alternatives, Group, TokenStatistics
from opd_mlx.kernels.sums import total

CHUNK_BYTES = 64 * 1024**2
"""Bytes of one [C, V] buffer.

At most nine are alive at a time, or four where blocks are smaller than chunks.
"""


@dataclass(frozen=True)
class HeadResult:
    """Statistics [N] of every row, and the gradient of sum(weights * ratio * divergence).

    The gradient is to hidden states [N, D] and head [V, D]. With `top`, the most likely tokens and
    their log-probabilities of both policies, [N, top] each, best first.
    """

    student_logprobs: mx.array
    teacher_logprobs: mx.array
    student_entropy: mx.array
    teacher_entropy: mx.array
    ratio: mx.array
    divergence: mx.array
    hidden_gradient: mx.array | None = None
    head_gradient: mx.array | None = None
    student_top: tuple[mx.array, mx.array] | None = None
    teacher_top: tuple[mx.array, mx.array] | None = None

    def records(self, computed: Sequence[Group]) -> list[list[TokenStatistics]]:
        """One record for every completion of the `computed` groups, whose tokens are the rows."""
        statistics = np.array(mx.stack([getattr(self, name) for name in STATISTICS], axis=1))
        student_top, teacher_top = (
            None if top is None else Alternatives(np.array(top[0]), np.array(top[1]))
            for top in (self.student_top, self.teacher_top)
        )
        return groups.records(computed, statistics, student_top, teacher_top)


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
    block_bytes: int = CHUNK_BYTES,
    gradient: bool = True,
    train_head: bool = True,
    top: int = 0,
) -> HeadResult:
    """Statistics and gradients of N rows.

    Hidden states are [N, D], heads [V, D], `tokens`, `sampler_logprobs` and `weights` [N]. `chunk`
    rows meet the head together; one array of the rows that go on together has at most
    `block_bytes`. Everything after the hidden states is float32, or float64 if they are. Without
    `train_head` there is no gradient to the head.
    """
    dtype = mx.float64 if student_hidden.dtype == mx.float64 else mx.float32
    shared = teacher_head is student_head
    student_head = student_head.astype(dtype)
    heads = student_head, student_head if shared else teacher_head.astype(dtype)
    block = max(1, block_bytes // (4 * len(student_head)))
    parts: list[dict[str, mx.array]] = []
    head_gradient = mx.zeros(student_head.shape, dtype) if gradient and train_head else None
    for start in range(0, len(tokens), chunk):
        rows = slice(start, start + chunk)
        student = student_hidden[rows].astype(dtype)
        teacher = teacher_hidden[rows].astype(dtype)
        logits = [student @ heads[0].T, teacher @ heads[1].T]
        inputs = tokens[rows], sampler_logprobs[rows], weights[rows]
        part, to_logits = _chunk(logits, *inputs, objective, block, gradient, top)
        if to_logits is not None:
            part["hidden_gradient"] = to_logits @ heads[0]
            if head_gradient is not None:
                head_gradient = mx.addmm(head_gradient, to_logits.T, student)
                mx.eval(head_gradient)
        del to_logits
        mx.eval(part)
        parts.append(part)
    whole = _concatenated(parts)
    student_top, teacher_top = (
        (whole.pop(f"{policy}_tokens"), whole.pop(f"{policy}_alternatives")) if top else None
        for policy in ("student", "teacher")
    )
    return HeadResult(
        **whole, head_gradient=head_gradient, student_top=student_top, teacher_top=teacher_top
    )


def _chunk(
    logits: list[mx.array],
    tokens: mx.array,
    sampler: mx.array,
    weights: mx.array,
    objective: Objective,
    block: int,
    gradient: bool,
    top: int,
) -> tuple[dict[str, mx.array], mx.array | None]:
    """Results by name, and the weighted gradient [C, V] to the student's logits if `gradient`.

    `logits` [C, V] are the student's and the teacher's; the list is emptied. `block` rows go
    together.
    """
    count = len(tokens)
    blocks = count > block
    parts, to_logits = [], []
    if blocks:
        mx.eval(logits)
    for start in range(0, count, block):
        rows = slice(start, start + block)
        some = [x[rows] for x in logits] if blocks else logits
        part, slope = _block(some, tokens[rows], sampler[rows], objective, top)
        if gradient:
            factor = weights[rows] * part["ratio"] / objective.temperature
            to_logits.append(slope * factor[:, None])
        del slope
        if blocks:
            mx.eval(part, to_logits)
        parts.append(part)
    logits.clear()
    return _concatenated(parts), mx.concatenate(to_logits) if gradient else None


def _concatenated(parts: list[dict[str, mx.array]]) -> dict[str, mx.array]:
    return {name: mx.concatenate([part[name] for part in parts]) for name in parts[0]}


def _block(
    logits: list[mx.array], tokens: mx.array, sampler: mx.array, objective: Objective, top: int
) -> tuple[dict[str, mx.array], mx.array]:
    """Results by name, and the gradient [C, V] of the divergence to the student's logits /
    temperature.

    Takes `logits` [C, V] of student and teacher out of their list, and evaluates one policy before
    the other begins, so that no array lives longer than it is needed.
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
        divergence = part["student_logprobs"] - part["teacher_logprobs"]
        part["divergence"] = divergence
        inside = (divergence * -mx.expm1(part["student_logprobs"]))[:, None]
        return part, mx.put_along_axis(-divergence[:, None] * p, tokens, inside, axis=-1)
    if k is None:
        mx.eval(part)
        part["divergence"], outer = _between(s, t, p, q, objective.alpha)
        return part, outer - p * outer.sum(-1, keepdims=True)
    t_k = mx.take_along_axis(t, ids, -1)
    divergence, inside, outside = _on_support(s_k, t_k, s_rest, _rest(q, ids), objective)
    part["divergence"] = divergence
    mx.eval(part, inside, outside)
    return part, mx.put_along_axis(outside * p, ids, inside, axis=-1)


def _policy(
    part: dict[str, mx.array],
    policy: str,
    logits: list[mx.array],
    tokens: mx.array,
    temperature: float,
    top: int,
) -> tuple[mx.array, mx.array]:
    """Log-probabilities and probabilities [C, V] from the first of `logits`, which is taken.

    Results by name go to `part`.
    """
    scaled = logits.pop(0) if temperature == 1.0 else logits.pop(0) / temperature
    logprobs, probabilities = _log_softmax(scaled)
    del scaled
    mx.eval(logprobs, probabilities)
    part[f"{policy}_logprobs"] = mx.take_along_axis(logprobs, tokens, -1)[:, 0]
    part[f"{policy}_entropy"] = -(probabilities * logprobs).sum(-1)
    if top:
        every = top >= logprobs.shape[-1]
        ids = mx.argsort(-logprobs) if every else mx.argpartition(-logprobs, top - 1)[:, :top]
        order = mx.argsort(-mx.take_along_axis(logprobs, ids, -1), axis=-1)
        ids = mx.take_along_axis(ids, order, -1)
        part[f"{policy}_tokens"] = ids.astype(mx.int32)
        part[f"{policy}_alternatives"] = mx.take_along_axis(logprobs, ids, -1)
    return logprobs, probabilities


def _log_softmax(scores: mx.array) -> tuple[mx.array, mx.array]:
    """Logarithms of the softmax over the last axis, and the softmax, by one exponential a number.

    Half the time of two: the exponential is what takes time here.
    """
    scores = scores - scores.max(-1, keepdims=True)
    powers = mx.exp(scores)
    whole = total(powers)
    return scores - mx.log(whole), powers / whole


def _rest(p: mx.array, ids: mx.array) -> mx.array:
    """Probability [C, 1] that `p` [C, V] has outside of `ids` [C, K].

    A sum of what is outside, not 1 minus what is inside: below 1e-7 float32 would lose that.
    """
    outside = mx.put_along_axis(p, ids, mx.zeros(ids.shape, p.dtype), axis=-1)
    return outside.sum(-1, keepdims=True)


def _on_support(
    s: mx.array, t: mx.array, s_rest: mx.array, t_rest: mx.array, objective: Objective
) -> tuple[mx.array, mx.array, mx.array]:
    """Divergence [C] over the support's log-probabilities [C, K] and its tail, and its derivative.

    The tail has the probabilities [C, 1]. The derivative is to the logits (over T): on the support
    [C, K], and elsewhere in units of the student's probability [C, 1]. Support and tail are a
    softmax too, so nothing is divided by the tail except its own parts.
    """
    if not objective.tail:
        s, t = s - mx.logsumexp(s, -1, keepdims=True), t - mx.logsumexp(t, -1, keepdims=True)
        p = mx.exp(s)
        divergence, inner = _between(s, t, p, mx.exp(t), objective.alpha)
        return divergence, inner - p * inner.sum(-1, keepdims=True), mx.zeros_like(s_rest)
    s_rest, t_rest = (mx.maximum(rest, LEAST_TAIL) for rest in (s_rest, t_rest))
    pairs = ((s, s_rest), (t, t_rest))
    p, q = (mx.concatenate([mx.exp(x), rest], axis=-1) for x, rest in pairs)
    s, t = (mx.concatenate([x, mx.log(rest)], axis=-1) for x, rest in pairs)
    divergence, inner = _between(s, t, p, q, objective.alpha)
    # Where the bound holds the tail still, nothing moves it. At alpha 1 `_between` leaves out a
    # multiple of p, whose part in the tail is missing then.
    left_out = float(objective.alpha == 1.0)
    rate = mx.where(s_rest > LEAST_TAIL, inner[:, -1:] / s_rest, -left_out)
    mass = inner[:, :-1].sum(-1, keepdims=True) + rate * s_rest
    return divergence, inner[:, :-1] - p[:, :-1] * mass, rate - mass


def _between(
    s: mx.array, t: mx.array, p: mx.array, q: mx.array, alpha: float
) -> tuple[mx.array, mx.array]:
    """Generalised Jensen-Shannon divergence [C] of two distributions [C, K], and its derivative to
    s.

    The distributions are given with their logarithms. The derivative may lack a multiple of p: a
    softmax cancels it, and beside it the rest would be rounded.
    """
    if alpha == 0.0:
        return (q * (t - s)).sum(-1), -q
    if alpha == 1.0:
        inner = p * (s - t)
        return inner.sum(-1), inner
    # Through the difference, which is exact where the two are close: s - m = log(p / m) and
    # p - m = -alpha (q - p), and so for t. Where one of the two is next to nothing beside m, its
    # logarithm has a bound, and weighs as little.
    numbers = mx.finfo(p.dtype)
    difference = q - p
    difference = difference / mx.maximum(p + alpha * difference, numbers.smallest_normal)
    s_m, t_m = (
        mx.log1p(mx.maximum(share * difference, numbers.eps / 2 - 1))
        for share in (-alpha, 1.0 - alpha)
    )
    inner = (1.0 - alpha) * p * s_m
    return (inner + alpha * q * t_m).sum(-1), inner


def _importance_ratio(student: mx.array, sampler: mx.array, clip: float | None) -> mx.array:
    """Ratio [C] of the student's to the sampler's probability of each token, at most `clip`.

    Without a clip the ratio is 1.
    """
    if clip is None:
        return mx.ones_like(student)
    difference = mx.clip(student - sampler, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return mx.minimum(mx.exp(difference), clip)
