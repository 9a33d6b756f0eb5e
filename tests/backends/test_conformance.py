"""The conformance suite passes on every backend, and fails on backends that are wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from opd import registry
from opd.prompts.encoder import PromptEncoder
from opd.testing.conformance import CHECKS, Material, Result, check
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.types import ModelOptions
from opd.views import usable
from opd.views.view import ViewOptions
from tests.conftest import coloured


def pairs(encoder, examples):
    view = ViewOptions()
    return [
        (usable.encode_student(encoder, one), usable.encode_teacher(encoder, one, view))
        for one in examples
    ]


def toy():
    """Pairs of prompts of the toy encoder, and its tokens that end or never appear."""
    encoder = ToyEncoder()
    return pairs(encoder, coloured(4)), encoder.stop, encoder.banned


def test_toy():
    assert [str(result) for result in check(ToyBackend, *toy()) if not result.passed] == []


def test_backends(backend_name, random_model):
    encoder = PromptEncoder(random_model)
    examples = [
        replace(one, question=one.question * (1 + index)) for index, one in enumerate(coloured(4))
    ]
    results = check(
        lambda: registry.load(backend_name, ModelOptions(random_model)),
        pairs(encoder, examples),
        encoder.stop,
        encoder.banned,
    )
    assert [str(result) for result in results if not result.passed] == []


class Mean(ToyBackend):
    """Averages per call, as the official code does."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        before = {name: value.copy() for name, value in self.gradient.items()}
        statistics = super().accumulate(groups, objective, split, prefill)
        for name, value in self.gradient.items():
            value[...] = before[name] + (value - before[name]) / len(groups)
        return statistics


class LosesTheRest(ToyBackend):
    """Only the first completions of a split group teach."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        before = {name: value.copy() for name, value in self.gradient.items()}
        statistics = super().accumulate(groups, objective, split, prefill)
        if split:
            first = [
                replace(one, completions=one.completions[:split], weights=one.weights[:split])
                for one in groups
            ]
            self.gradient = before
            super().accumulate(first, objective)
        return statistics


class Unweighted(ToyBackend):
    """Every token counts alike."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        ones = [
            replace(group, weights=tuple(np.ones_like(one) for one in group.weights))
            for group in groups
        ]
        return super().accumulate(ones, objective, split, prefill)


class OwnOrder(ToyBackend):
    """Takes what ran for one prompt as that of another."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        if prefill and prefill.order != tuple(range(len(groups))):
            wrong = [
                replace(group, student=prompt)
                for group, prompt in zip(groups, prefill.prompts, strict=True)
            ]
            prefill.release()
            return super().accumulate(wrong, objective, split)
        return super().accumulate(groups, objective, split, prefill)


class KeepsOldWeights(ToyBackend):
    """Takes a prefill of any weights."""

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        return super().sample(prompts, uniforms, sampling, policy)


class Unclipped(ToyBackend):
    def apply(self, update):
        return super().apply(replace(update, gradient_clip=None))


class NoBias(ToyBackend):
    def apply(self, update):
        self.steps += 1000
        result = super().apply(update)
        self.steps -= 1000
        return result


class Forgets(ToyBackend):
    """Loses the teacher on resume, as the official code does."""

    def load(self, folder):
        super().load(folder)
        self.teacher = {name: value.copy() for name, value in self.student.items()}


class TeacherSeesStudent(ToyBackend):
    """The gradient goes through the teacher's side too, and with the wrong sign."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        statistics = super().accumulate(groups, objective, split, prefill)
        self.gradient["vision"] *= -1
        return statistics


class Warm(ToyBackend):
    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        return super().sample(
            prompts, uniforms, replace(sampling, temperature=sampling.temperature and 1.1), policy
        )


class Unbanned(ToyBackend):
    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        return super().sample(prompts, uniforms, replace(sampling, banned=()), policy)


class Steps(ToyBackend):
    def apply(self, update):
        if not all(np.isfinite(value).all() for value in self.gradient.values()):
            self.gradient = {
                name: np.nan_to_num(value) + 1 for name, value in self.gradient.items()
            }
        return super().apply(update)


class Slow(ToyBackend):
    def move_teacher(self, rate):
        super().move_teacher(rate * 0.9)


class LooksAhead(ToyBackend):
    """A row's attention depends on how many tokens follow."""

    def attend(self, prompts, completions, policy="student"):
        rows = super().attend(prompts, completions, policy)
        return [[weights / weights.shape[1] for weights in row] for row in rows]


class Leaks(ToyBackend):
    def score(self, groups, objective, top=0):
        super().accumulate(groups, objective)
        return super().score(groups, objective, top)


class PerCompletion(ToyBackend):
    """Every group weighs the same, however many completions it has."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        shared = [
            replace(one, weights=tuple(values / len(one.weights) for values in one.weights))
            for one in groups
        ]
        return super().accumulate(shared, objective, split, prefill)


class Renormalises(ToyBackend):
    """The weights of every call sum to 1."""

    def accumulate(self, groups, objective, split=0, prefill=None):
        whole = sum(values.sum() for one in groups for values in one.weights)
        shares = [
            replace(one, weights=tuple(values / whole for values in one.weights)) for one in groups
        ]
        return super().accumulate(shares, objective, split, prefill)


BROKEN = [
    (PerCompletion, "a group equals its rows"),
    (Renormalises, "weights scale the gradient"),
    (Unweighted, "weights scale the gradient"),
    (LosesTheRest, "split groups are whole"),
    (Mean, "calls add up"),
    (OwnOrder, "a prefill changes nothing"),
    (KeepsOldWeights, "a prefill changes nothing"),
    (Unclipped, "a step is AdamW"),
    (NoBias, "a step is AdamW"),
    (Forgets, "a checkpoint restores all"),
    (TeacherSeesStudent, "the gradient is the loss's derivative"),
    (Warm, "on-policy ratio is one"),
    (Unbanned, "sampling keeps the rules"),
    (LooksAhead, "attention is of its own rows"),
    (Steps, "a step that is not finite changes nothing"),
    (Slow, "the teacher moves by its rate"),
    (Leaks, "score is accumulate without gradient"),
]


@pytest.mark.parametrize(("broken", "check_name"), BROKEN)
def test_every_check_can_fail(broken, check_name):
    ((run, bound),) = ((run, bound) for name, run, bound in CHECKS if name == check_name)
    assert not Result(check_name, run(Material(broken, *toy())), bound).passed


def test_every_check_has_a_backend_that_fails_it():
    assert {name for name, _, _ in CHECKS} == {name for _, name in BROKEN}


@pytest.mark.parametrize(("error", "passed"), [(1.0, True), (1.1, False), (np.nan, False)])
def test_an_error_that_is_no_number_does_not_pass(error, passed):
    assert Result("a check", error, bound=1.0).passed is passed
