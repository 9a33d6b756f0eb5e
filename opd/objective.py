"""The objective: token-level divergence between student and teacher, and its float64 numpy
reference.

Legend: N completion tokens, V vocabulary, K support (top-k entries of the student), T temperature.
Small letters s, t, m are log-probabilities of student, teacher and their mixture; p, q, r the
probabilities.

For every completion token, with s = log_softmax(student logits / T) and t likewise over the full
vocabulary:

1. support: the `top_k` largest student entries; t is gathered at the same ids; the ids are
   constants for the gradient;
2. tail: one more bucket holds the rest of the mass; without a tail both sides are renormalised
   over the support;
3. divergence with M = (1 - alpha) S + alpha T:  (1 - alpha) KL(S || M) + alpha KL(T || M);
   by convention alpha = 0 is KL(T || S) and alpha = 1 is KL(S || T), where the formula's limit
   is 0;
4. the divergence is multiplied by the importance ratio
   min(exp(clip(s[token] - sampler, -20, 20)), ratio_clip), a constant for the gradient.

Source: Vision-OPD (arXiv 2605.18740), sections 3.2 and 3.3; generalised Jensen-Shannon: GKD (arXiv
2306.13649), eq. 1. The backends hold kernels of the same function and are tested against this
module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from opd.options import Options

Float64 = NDArray[np.float64]

LOG_RATIO_BOUND = 20.0
"""The logarithm of the importance ratio is clipped to [-20, 20] before exp."""

LEAST_TAIL = 1e-7
"""Lower bound of the tail's probability, so that the logarithm stays finite."""


@dataclass(frozen=True)
class Objective:
    """The function that is minimised at every completion token.

    `alpha` in 0..1: weight of the teacher in the mixture. `top_k` >= 1: size of the support; None:
    the full vocabulary. `tail`: adds one bucket for the mass outside the support. `ratio_clip` > 0:
    upper bound of the importance ratio; None: the ratio is 1. `temperature` > 0 divides the logits
    of both policies.
    `form`: "divergence" is the full divergence; "sampled" is the policy-gradient form of the
    reverse KL, `stop_gradient(s[token] - t[token]) * s[token]`, which reads the sampled token alone
    (alpha, top_k and tail unused).
    """

    alpha: float = 0.5
    top_k: int | None = 100
    tail: bool = True
    ratio_clip: float | None = 2.0
    temperature: float = 1.0
    form: Literal["divergence", "sampled"] = "divergence"

    def support(self, vocabulary: int) -> int | None:
        """Number of entries in the support; None if the support is the full vocabulary, which
        leaves no tail."""
        return None if self.top_k is None or self.top_k >= vocabulary else self.top_k


class ObjectiveOptions(Options):
    """The divergence that is minimised at every completion token."""

    form: Literal["divergence", "sampled"] = Field(
        "divergence", description="The full divergence, or its form on the sampled token alone."
    )
    alpha: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Weight of the teacher in the mixture; 0: forward KL, 1: reverse KL.",
    )
    top_k: int = Field(
        100,
        ge=0,
        description="Most likely tokens of the student that are compared; 0: the full vocabulary.",
    )
    tail: bool = Field(
        True,
        description=(
            "One more bucket for the mass outside the top k; else both sides are renormalised."
        ),
    )
    ratio_clip: float = Field(
        2.0, ge=0, description="Upper bound of the importance ratio; 0 turns the correction off."
    )

    def objective(self, temperature: float) -> Objective:
        """The objective at the sampling temperature."""
        return Objective(
            self.alpha,
            self.top_k or None,
            self.tail,
            self.ratio_clip or None,
            temperature,
            self.form,
        )


@dataclass(frozen=True)
class Evaluation:
    """The full result of the reference, float64: [N] arrays in nats, and `gradient` [N, V], the
    derivative of ratio * divergence with respect to the raw student logits.

    In the sampled form `gradient` is the surrogate's, whose value is not the divergence.
    """

    student_logprobs: Float64
    teacher_logprobs: Float64
    student_entropy: Float64
    teacher_entropy: Float64
    ratio: Float64
    divergence: Float64
    gradient: Float64


def reference(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    tokens: ArrayLike,
    sampler_logprobs: ArrayLike,
    objective: Objective,
) -> tuple[Float64, Float64]:
    """The value [N] (importance ratio times divergence, nats) and the value's gradient [N, V] with
    respect to the raw student logits, in float64.

    `student_logits`, `teacher_logits` [N, V]: raw. `tokens` [N]: ids. `sampler_logprobs` [N]: nats,
    as the sampler recorded them.
    """
    result = evaluate(student_logits, teacher_logits, tokens, sampler_logprobs, objective)
    return result.ratio * result.divergence, result.gradient


def evaluate(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    tokens: ArrayLike,
    sampler_logprobs: ArrayLike,
    objective: Objective,
) -> Evaluation:
    """Statistics of every token, divergence and gradient; the arguments are those of
    `reference`."""
    ids = np.asarray(tokens, dtype=np.int64)
    rows = np.arange(len(ids))
    s = log_softmax(np.asarray(student_logits, dtype=np.float64) / objective.temperature)
    t = log_softmax(np.asarray(teacher_logits, dtype=np.float64) / objective.temperature)
    ratio = importance_ratio(
        s[rows, ids], np.asarray(sampler_logprobs, dtype=np.float64), objective.ratio_clip
    )
    if objective.form == "sampled":
        divergence = s[rows, ids] - t[rows, ids]
        outer = np.zeros_like(s)
        outer[rows, ids] = divergence
    else:
        divergence, outer = _divergence(s, t, objective)
    # Through s = z / T - logsumexp(z / T): ds_i/dz_j = (1[i = j] - p_j) / T.
    gradient = (
        (outer - np.exp(s) * outer.sum(-1, keepdims=True)) * ratio[:, None] / objective.temperature
    )
    return Evaluation(
        student_logprobs=s[rows, ids],
        teacher_logprobs=t[rows, ids],
        student_entropy=-(np.exp(s) * s).sum(-1),
        teacher_entropy=-(np.exp(t) * t).sum(-1),
        ratio=ratio,
        divergence=divergence,
        gradient=gradient,
    )


def importance_ratio(
    student_logprobs: Float64, sampler_logprobs: Float64, clip: float | None
) -> Float64:
    """Ratio [N] of the student's to the sampler's probability of each token, at most `clip`; if
    `clip` is None, every ratio is 1."""
    if clip is None:
        return np.ones_like(student_logprobs)
    log_ratio = np.clip(student_logprobs - sampler_logprobs, -LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    return np.minimum(np.exp(log_ratio), clip)


def log_softmax(logits: Float64) -> Float64:
    """Normalised log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _divergence(s: Float64, t: Float64, objective: Objective) -> tuple[Float64, Float64]:
    """Divergence [N] and its derivative [N, V] to the student's log-probabilities s."""
    k = objective.support(s.shape[-1])
    if k is None:
        return _between(s, t, objective.alpha)
    ids = np.argpartition(-s, k - 1, axis=-1)[:, :k]
    s_k, t_k = np.take_along_axis(s, ids, -1), np.take_along_axis(t, ids, -1)
    if objective.tail:
        s_rest, t_rest = (_rest(x, ids) for x in (s, t))
        divergence, inner = _between(
            _with_tail(s_k, s_rest), _with_tail(t_k, t_rest), objective.alpha
        )
        # d log(tail) / d s_i = -p_i / tail, and 0 where LEAST_TAIL bounds the tail.
        slope = np.where(s_rest > LEAST_TAIL, -1.0 / np.maximum(s_rest, LEAST_TAIL), 0.0)
        at_support = inner[:, :k] + inner[:, k:] * slope * np.exp(s_k)
    else:
        s_mass, t_mass = _logsumexp(s_k), _logsumexp(t_k)
        divergence, inner = _between(s_k - s_mass, t_k - t_mass, objective.alpha)
        at_support = inner - np.exp(s_k - s_mass) * inner.sum(-1, keepdims=True)
    outer = np.zeros_like(s)
    np.put_along_axis(outer, ids, at_support, -1)
    return divergence, outer


def _rest(logprobs: Float64, ids: NDArray[np.intp]) -> Float64:
    """The probability [N, 1] outside of `ids` [N, K], from `logprobs` [N, V]."""
    outside = np.exp(logprobs)
    np.put_along_axis(outside, ids, 0.0, -1)
    return np.asarray(outside.sum(-1, keepdims=True))


def _with_tail(logprobs: Float64, rest: Float64) -> Float64:
    """`logprobs` [N, K] and a last bucket with the probability `rest` [N, 1]."""
    return np.concatenate([logprobs, np.log(np.maximum(rest, LEAST_TAIL))], axis=-1)


def _between(s: Float64, t: Float64, alpha: float) -> tuple[Float64, Float64]:
    """Generalised Jensen-Shannon divergence [N] of two log-distributions [N, K], and the derivative
    [N, K] with respect to s."""
    p, q = np.exp(s), np.exp(t)
    if alpha == 0.0:
        return (q * (t - s)).sum(-1), -q
    if alpha == 1.0:
        return (p * (s - t)).sum(-1), p * (s - t + 1.0)
    m = np.logaddexp(np.log1p(-alpha) + s, np.log(alpha) + t)
    divergence = (1.0 - alpha) * (p * (s - m)).sum(-1) + alpha * (q * (t - m)).sum(-1)
    return divergence, (1.0 - alpha) * p * (s - m)


def _logsumexp(x: Float64) -> Float64:
    top = x.max(-1, keepdims=True)
    return np.asarray(top + np.log(np.exp(x - top).sum(-1, keepdims=True)))
