"""Every backend's divergence kernel against the float64 reference: value and gradient, head
included, at odd sizes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from opd.objective import Objective, evaluate, log_softmax
from opd.types import STATISTICS

N, D, V, CHUNK = 10, 6, 37, 3
GRID = list(itertools.product([0.0, 0.3, 0.5, 1.0], [None, 5, V], [True, False], [0.7, 1.0, 1.3]))


def case(seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(size=(2, N, D))
    student_head, teacher_head = rng.normal(size=(2, V, D))
    tokens = rng.integers(V, size=N)
    weights = rng.uniform(0, 1, size=N)
    weights[4] = 0
    return (
        [value.astype(np.float32) for value in (student, student_head, teacher, teacher_head)],
        tokens,
        weights.astype(np.float32),
    )


def forged(student_logits, tokens, temperature):
    """Sampler's log-probabilities on both sides of the ratio's clip."""
    offsets = np.random.default_rng(1).normal(size=len(tokens))
    return (
        log_softmax(student_logits.astype(np.float64) / temperature)[np.arange(len(tokens)), tokens]
        - offsets
    ).astype(np.float32)


def check(kernel, objective, **options):
    (student, student_head, teacher, teacher_head), tokens, weights = case()
    student_logits = student.astype(np.float64) @ student_head.T
    teacher_logits = teacher.astype(np.float64) @ teacher_head.T
    sampler = forged(student_logits, tokens, objective.temperature)
    expected = evaluate(student_logits, teacher_logits, tokens, sampler, objective)
    result = kernel(
        student, student_head, teacher, teacher_head, tokens, sampler, weights, objective, **options
    )
    for name in STATISTICS:
        np.testing.assert_allclose(
            result[name], getattr(expected, name), rtol=2e-5, atol=5e-6, err_msg=name
        )
    gradient = weights[:, None] * expected.gradient
    np.testing.assert_allclose(
        result["hidden_gradient"], gradient @ student_head, rtol=2e-5, atol=5e-6
    )
    np.testing.assert_allclose(result["head_gradient"], gradient.T @ student, rtol=2e-5, atol=5e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("depth", [10, 14, 19])
def test_a_tail_of_next_to_nothing_is_exact(kernel, alpha, depth):
    # All but five tokens are exp(-depth) of the others: what five leave of 1 is known to 6e-8 in
    # float32, their own sum to 1e-7 of itself.
    rng = np.random.default_rng(depth)
    logits = rng.normal(size=(2, V, N)).astype(np.float32)
    logits[:, 5:] -= depth
    hidden, tokens, weights = (
        np.eye(N, dtype=np.float32),
        rng.integers(5, size=N),
        np.ones(N, np.float32),
    )
    objective = Objective(alpha, 5, tail=True, ratio_clip=None)
    expected = evaluate(*(x.T.astype(np.float64) for x in logits), tokens, np.zeros(N), objective)
    result = kernel(
        hidden,
        logits[0],
        hidden,
        logits[1],
        tokens,
        np.zeros(N, np.float32),
        weights,
        objective,
        chunk=CHUNK,
    )
    np.testing.assert_allclose(result["divergence"], expected.divergence, rtol=1e-5)
    np.testing.assert_allclose(
        result["head_gradient"][:5], expected.gradient.T[:5], rtol=2e-5, atol=1e-6
    )
    np.testing.assert_allclose(result["head_gradient"][5:], expected.gradient.T[5:], rtol=5e-4)


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_divergence_of_close_policies_is_exact(kernel, top_k):
    # Of 1e-6 of logits near 1: what rounding does to a logarithm is as large as the difference,
    # unless the difference itself is taken.
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(V, N)).astype(np.float32)
    other = (logits + 0.01 * rng.normal(size=(V, N))).astype(np.float32)
    hidden, tokens, weights = (
        np.eye(N, dtype=np.float32),
        rng.integers(V, size=N),
        np.ones(N, np.float32),
    )
    objective = Objective(0.5, top_k, ratio_clip=None)
    expected = evaluate(
        logits.T.astype(np.float64), other.T.astype(np.float64), tokens, np.zeros(N), objective
    )
    result = kernel(
        hidden,
        logits,
        hidden,
        other,
        tokens,
        np.zeros(N, np.float32),
        weights,
        objective,
        chunk=CHUNK,
    )
    assert expected.divergence.max() < 5e-5
    np.testing.assert_allclose(result["divergence"], expected.divergence, rtol=1e-3)


@pytest.mark.parametrize(("alpha", "top_k", "tail", "temperature"), GRID)
def test_divergence(kernel, alpha, top_k, tail, temperature):
    check(kernel, Objective(alpha, top_k, tail, 2.0, temperature), chunk=CHUNK)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_form(kernel, temperature):
    check(kernel, Objective(form="sampled", temperature=temperature), chunk=CHUNK)


def test_no_ratio(kernel):
    check(kernel, Objective(top_k=5, ratio_clip=None), chunk=CHUNK)


@pytest.mark.parametrize("chunk", [1, N, 100])
def test_chunks_change_nothing(kernel, chunk):
    check(kernel, Objective(top_k=5), chunk=chunk)


@pytest.mark.parametrize(
    "objective",
    [Objective(top_k=None, temperature=1.3), Objective(top_k=5), Objective(form="sampled")],
)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_blocks_change_nothing(kernel, objective, rows):
    """Of chunks of seven rows and a last one of three."""
    arguments = *case()[0], case()[1], np.zeros(N, np.float32), case()[2], objective
    whole = kernel(*arguments, chunk=N, top=3)
    blocks = {"block_bytes": 4 * V * rows}
    check(kernel, objective, chunk=7, **blocks)
    for name, value in kernel(*arguments, chunk=7, top=3, **blocks).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_a_confident_student_stays_finite(kernel):
    """Mass outside the support below float32's resolution: the tail's bound holds."""
    (student, student_head, teacher, teacher_head), tokens, weights = case()
    arguments = (40 * student, student_head, teacher, teacher_head, tokens, np.zeros(N), weights)
    for alpha, tail in itertools.product([0.0, 0.5, 1.0], [True, False]):
        for name, value in kernel(*arguments, Objective(alpha, 5, tail), chunk=CHUNK).items():
            assert np.isfinite(value).all(), name


def test_alternatives_are_the_most_likely_tokens(kernel, backend_name):

    (student, student_head, teacher, teacher_head), tokens, weights = case()
    result = kernel(
        student,
        student_head,
        teacher,
        teacher_head,
        tokens,
        np.zeros(N),
        weights,
        Objective(),
        chunk=CHUNK,
        gradient=False,
        top=3,
    )
    assert "hidden_gradient" not in result
    for policy, hidden, head in (
        ("student", student, student_head),
        ("teacher", teacher, teacher_head),
    ):
        logprobs = log_softmax(hidden.astype(np.float64) @ head.T)
        best = np.argsort(-logprobs, axis=-1)[:, :3]
        found_tokens, found_logprobs = (
            result[f"{policy}_top_{what}"] for what in ("tokens", "logprobs")
        )
        np.testing.assert_array_equal(found_tokens, best)
        np.testing.assert_allclose(
            found_logprobs, np.take_along_axis(logprobs, best, -1), rtol=1e-4, atol=1e-5
        )
