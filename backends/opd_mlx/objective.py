"""The divergence kernel: head, loss and gradient in one pass over chunks of completion rows.

`opd.objective` has the mathematics. The forward also computes the gradient, and every chunk is
evaluated before the next begins, outside of any gradient trace, so memory does not grow with N.
Everything between the matrix products of a chunk can run block by block, in blocks that stay in a
CPU's caches.

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
from opd.memory import CHUNK_BYTES
from opd.objective import LEAST_TAIL, LOG_RATIO_BOUND, Objective
from opd.types import STATISTICS, Alternatives, Group, TokenStatistics
from opd_mlx.kernels.sums import total


@dataclass(frozen=True)
class HeadResult:
    """The statistics [N] of all rows, and the gradient of sum(weights * ratio * divergence) with
    respect to the student's hidden states [N, D] and head [V, D].

    `student_top` and `teacher_top` are the most likely tokens and their log-probabilities, [N, top]
    each, best first; None if `top` was 0.
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
        """Cuts the rows into one record for each completion of the `computed` groups."""
        statistics = np.array(mx.stack([getattr(self, name) for name in STATISTICS], axis=1))
        student_top, teacher_top = (
            None if top is None else Alternatives(np.array(top[0]), np.array(top[1]))
            for top in (self.student_top, self.teacher_top)
        )
        return groups.records(computed, statistics, student_top, teacher_top)


def default_chunk(vocabulary: int) -> int:
    """The rows of a chunk: as many as fill a float32 array [C, V] of CHUNK_BYTES, at least 16."""
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
    """Computes the divergence of every row, from hidden states [N, D] and heads [V, D].

    `tokens` [N] are ids, `sampler_logprobs` [N] the log-probabilities recorded when they were
    sampled, `weights` [N] the rows' weights. Logits and everything computed from them are float32,
    or float64 for hidden states in float64. `chunk` rows are multiplied with the heads together;
    everything else runs on blocks of rows, whose arrays have at most `block_bytes` each. Without
    `gradient` no gradient is computed, and without `train_head` none for the head. With `top`, the
    `top` most likely tokens of both policies are returned too.
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
    """Computes a chunk's results by name and, if `gradient`, the weighted gradient [C, V] of the
    student's logits.

    `logits` [C, V] are the student's and the teacher's; the list is emptied. `block` rows run
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
        part, logits_gradient = _block(some, tokens[rows], sampler[rows], objective, top)
        if gradient:
            factor = weights[rows] * part["ratio"] / objective.temperature
            to_logits.append(logits_gradient * factor[:, None])
        del logits_gradient
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
    """Computes a block's results by name, and the divergence's gradient [C, V] with respect to the
    student's logits over the temperature.

    Removes the `logits` [C, V] of student and teacher from the list, and evaluates one policy
    before the other begins, so that arrays are freed as early as possible.
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
    """Log-probabilities and probabilities [C, V] of the first `logits`, which are removed from the
    list.

    Adds the policy's results to `part` by name.
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
    """The logarithm of the softmax over the last axis, and the softmax, by one exponential per
    score, which takes half the time of two.
    """
    scores = scores - scores.max(-1, keepdims=True)
    powers = mx.exp(scores)
    whole = total(powers)
    return scores - mx.log(whole), powers / whole


def _rest(p: mx.array, ids: mx.array) -> mx.array:
    """The sum [C, 1] of `p` [C, V] outside of `ids` [C, K].

    In float32, 1 minus the sum inside would lose every rest below 1e-7.
    """
    outside = mx.put_along_axis(p, ids, mx.zeros(ids.shape, p.dtype), axis=-1)
    return outside.sum(-1, keepdims=True)


def _on_support(
    s: mx.array, t: mx.array, s_rest: mx.array, t_rest: mx.array, objective: Objective
) -> tuple[mx.array, mx.array, mx.array]:
    """The divergence [C] over the support's log-probabilities `s`, `t` [C, K] and the tail's
    probabilities `s_rest`, `t_rest` [C, 1], if the objective has a tail.

    Also returns the derivative with respect to the logits over T: on the support [C, K], and
    elsewhere [C, 1] as a factor of the student's probability. Support and tail together are a
    softmax, so only a fraction of the tail's probability is ever divided by that probability.
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
    # At LEAST_TAIL the tail's derivative is 0, up to the multiple of p that `_between` leaves out.
    left_out = float(objective.alpha == 1.0)
    rate = mx.where(s_rest > LEAST_TAIL, inner[:, -1:] / s_rest, -left_out)
    mass = inner[:, :-1].sum(-1, keepdims=True) + rate * s_rest
    return divergence, inner[:, :-1] - p[:, :-1] * mass, rate - mass


def _between(
    s: mx.array, t: mx.array, p: mx.array, q: mx.array, alpha: float
) -> tuple[mx.array, mx.array]:
    """The generalised Jensen-Shannon divergence [C] of two distributions `p`, `q` [C, K] with the
    logarithms `s`, `t`, and the derivative [C, K] with respect to s.

    The derivative may leave out a multiple of p. The backward of the softmax cancels such a
    multiple, and adding it would only round off the other terms.
    """
    if alpha == 0.0:
        return (q * (t - s)).sum(-1), -q
    if alpha == 1.0:
        inner = p * (s - t)
        return inner.sum(-1), inner
    # From the difference q - p, which is exact where the two are close: s - m = log(p / m) and
    # p - m = -alpha (q - p), and the same for t. Where p or q is tiny beside m, the logarithm is
    # clamped; p or q, by which it is multiplied, makes the error negligible.
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
    """The ratio [C] of the student's to the sampler's probability of each token, at most `clip`; 1
    without a clip.
    """
    if clip is None:
        return mx.ones_like(student)
    difference = mx.clip(student - sampler, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return mx.minimum(mx.exp(difference), clip)
