"""The reference is what every kernel is tested against, so it is checked by finite differences and
by numbers worked out by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from opd.objective import Objective, evaluate, importance_ratio, log_softmax, reference

V = 11
GRID = list(itertools.product([0.0, 0.3, 0.5, 1.0], [None, 5, V], [True, False], [0.7, 1.0, 1.3]))
OFFSETS = np.array([0.1, -0.5, 3.0, -3.0])
"""Forged log-ratios of student to sampler, on both sides of the clip at log 2 = 0.69."""


def case(seed=0):
    rng = np.random.default_rng(seed)
    return 2 * rng.normal(size=(4, V)), 2 * rng.normal(size=(4, V)), rng.integers(V, size=4)


def chosen(logits, tokens, temperature):
    return log_softmax(logits / temperature)[np.arange(len(tokens)), tokens]


@pytest.mark.parametrize(("alpha", "top_k", "tail", "temperature"), GRID)
def test_gradient_equals_finite_differences(alpha, top_k, tail, temperature):
    student, teacher, tokens = case()
    objective = Objective(alpha, top_k, tail, 2.0, temperature)

    def value(logits):
        # The ratio is a constant for the gradient: the sampler moves along with the student.
        return reference(
            logits, teacher, tokens, chosen(logits, tokens, temperature) - OFFSETS, objective
        )[0]

    _, gradient = reference(
        student, teacher, tokens, chosen(student, tokens, temperature) - OFFSETS, objective
    )
    for column in range(V):
        step = np.zeros(V)
        step[column] = 1e-6
        numeric = (value(student + step) - value(student - step)) / 2e-6
        np.testing.assert_allclose(gradient[:, column], numeric, atol=2e-8)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_form_is_the_policy_gradient_of_the_reverse_kl(temperature):
    student, teacher, tokens = case()
    objective = Objective(form="sampled", temperature=temperature)
    value, gradient = reference(
        student, teacher, tokens, chosen(student, tokens, temperature) - OFFSETS, objective
    )
    for column in range(V):
        step = np.zeros(V)
        step[column] = 1e-6
        slope = (
            chosen(student + step, tokens, temperature)
            - chosen(student - step, tokens, temperature)
        ) / 2e-6
        np.testing.assert_allclose(gradient[:, column], value * slope, atol=2e-8)


def test_sampled_form_averages_to_the_reverse_kl():
    student, teacher, _ = case()
    p = np.exp(log_softmax(student))[0]
    every = np.arange(V)
    rows = [np.repeat(logits[:1], V, axis=0) for logits in (student, teacher)]
    sampler = log_softmax(rows[0])[every, every]
    value, gradient = reference(*rows, every, sampler, Objective(form="sampled"))
    full, full_gradient = reference(
        student[:1], teacher[:1], [0], sampler[:1], Objective(alpha=1.0, top_k=None)
    )
    assert (p * value).sum() == pytest.approx(full[0], rel=1e-12)
    np.testing.assert_allclose((p[:, None] * gradient).sum(0), full_gradient[0], atol=1e-12)


def test_values_worked_out_by_hand():
    student, teacher = np.log([[0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25]])
    sampler = np.log([0.5])

    def value(**options):
        return reference(student, teacher, [0], sampler, Objective(**options))[0][0]

    assert value(alpha=0.0, top_k=None) == pytest.approx(0.25 * math.log(2))
    assert value(alpha=1.0, top_k=None) == pytest.approx(0.25 * math.log(2))
    mixture = [0.375, 0.375, 0.25]
    half = 0.5 * (0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375))
    assert value(alpha=0.5, top_k=None) == pytest.approx(2 * half)
    assert sum(mixture) == 1
    # Support of one: {0}; the tail holds 0.5 of the student and 0.75 of the teacher.
    forward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert value(alpha=0.0, top_k=1) == pytest.approx(forward)
    assert value(alpha=0.0, top_k=1, tail=False) == pytest.approx(0.0, abs=1e-12)


def test_the_mixture_leans_to_the_teacher_by_alpha():
    student, teacher, tokens = case()
    small = (
        reference(
            student,
            teacher,
            tokens,
            np.zeros(4),
            Objective(alpha=1e-6, top_k=None, ratio_clip=None),
        )[0]
        / 1e-6
    )
    forward = reference(
        student, teacher, tokens, np.zeros(4), Objective(alpha=0.0, top_k=None, ratio_clip=None)
    )[0]
    np.testing.assert_allclose(small, forward, rtol=1e-4)


def test_importance_ratio_is_clipped_above_only():
    ratio = importance_ratio(np.log([0.5, 0.5, 0.5]), np.log([0.5, 0.1, 0.9]), 2.0)
    np.testing.assert_allclose(ratio, [1.0, 2.0, 5 / 9])
    np.testing.assert_array_equal(
        importance_ratio(np.array([0.0, -5.0]), np.array([-3.0, 0.0]), None), [1.0, 1.0]
    )
    assert importance_ratio(np.array([0.0]), np.array([-1e4]), 1e30)[0] == pytest.approx(
        math.exp(20)
    )
    assert importance_ratio(np.array([-1e4]), np.array([0.0]), 2.0)[0] == pytest.approx(
        math.exp(-20)
    )


def test_ratio_multiplies_value_and_gradient():
    student, teacher, tokens = case()
    logprobs = chosen(student, tokens, 1.0)
    plain, plain_gradient = reference(student, teacher, tokens, logprobs, Objective())
    forged, forged_gradient = reference(
        student, teacher, tokens, logprobs - np.log(1.5), Objective()
    )
    np.testing.assert_allclose(forged, 1.5 * plain)
    np.testing.assert_allclose(forged_gradient, 1.5 * plain_gradient)


def test_the_support_is_the_students():
    student = np.log([[0.6, 0.3, 0.05, 0.05]])
    teacher = np.log([[0.05, 0.05, 0.3, 0.6]])
    value, gradient = reference(
        student, teacher, [0], np.log([0.6]), Objective(alpha=0.0, top_k=2, tail=False)
    )
    # Renormalised over ids 0 and 1: the teacher says 1/2 and 1/2, the student 2/3 and 1/3.
    assert value[0] == pytest.approx(0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3)))
    np.testing.assert_allclose(gradient[0], [2 / 3 - 0.5, 1 / 3 - 0.5, 0, 0], atol=1e-12)


def test_a_confident_student_stays_finite():
    student, teacher, tokens = case()
    student[:, 3] += 200
    for alpha, tail in itertools.product([0.0, 0.5, 1.0], [True, False]):
        value, gradient = reference(
            student, teacher, tokens, chosen(student, tokens, 1.0), Objective(alpha, 2, tail)
        )
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()


def test_equal_policies_are_at_a_minimum():
    student, _, tokens = case()
    for alpha in (0.0, 0.5, 1.0):
        result = evaluate(
            student, student, tokens, chosen(student, tokens, 1.0), Objective(alpha, 3)
        )
        np.testing.assert_allclose(result.divergence, 0, atol=1e-12)
        np.testing.assert_allclose(result.gradient, 0, atol=1e-12)
