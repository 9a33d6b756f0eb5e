"""What crosses the protocol arrives in the kernels, on every backend: each argument is changed, and what comes back is worked out apart.

`score` with all alternatives gives both policies' whole distributions; from them the reference says, in float64, what every objective
gives and which token every uniform draws. Nothing here looks into a backend.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from opd import backend as backends
from opd.models import ModelChoice
from opd.objective import Objective, evaluate, log_softmax
from opd.processor import open_encoder
from opd.tiny import MODEL
from opd.toy import ToyBackend, ToyEncoder
from opd.types import Completion, Group, Sampling, Update
from tests.conftest import INSTALLED

WHOLE = Objective(top_k=None, ratio_clip=None)
OBJECTIVE = Objective(alpha=0.5, top_k=7, tail=True, ratio_clip=1.5, temperature=1.0)
NAMES = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "ratio", "divergence")
STEP = Update(learning_rate=1e-2, weight_decay=0.1)
NOTHING = Update(learning_rate=0.0, weight_decay=0.0)
"""Clears the gradient, and changes no weight."""


class Case:
    """A backend whose teacher is not its student, groups of unequal prompts and completions for it, and the policies' distributions."""

    def __init__(self, name, folder):
        toy = name == "toy"
        self.make = ToyBackend if toy else lambda: backends.load(name, ModelChoice().options())
        self.encoder = ToyEncoder() if toy else open_encoder(MODEL)
        self.vocabulary = 16 if toy else 346
        rng = np.random.default_rng(0)
        pictures = [Image.fromarray(rng.integers(0, 255, (32, 32 + 16 * number, 3), dtype=np.uint8)) for number in range(6)]
        asked = ("What digit?", "Where is the red one?", "How many?")
        pairs = [
            (self.encoder.encode([pictures[number]], question), self.encoder.encode([pictures[3 + number]], question))
            for number, question in enumerate(asked)
        ]
        tokens = [[[5, 3, 9], [7]], [[2, 11]], [[4, 4, 4, 8], [6, 10]]]
        self.groups = [
            Group(
                student,
                teacher,
                tuple(Completion(np.array(one, np.int32), rng.normal(-3, 1, len(one)).astype(np.float32), False) for one in rows),
                tuple(rng.uniform(0.1, 1, len(one)).astype(np.float32) for one in rows),
            )
            for (student, teacher), rows in zip(pairs, tokens, strict=True)
        ]
        self.prompts = [group.student for group in self.groups]
        self.folder = folder
        backend = self.make()
        backend.accumulate(self.groups, OBJECTIVE)
        assert backend.apply(replace(STEP, learning_rate=0.5 if toy else 0.03)).taken
        backend.save(folder)
        self.loaded = backend
        # Ratios on both sides of every bound.
        self.groups = [
            replace(
                group,
                completions=tuple(
                    replace(one, logprobs=(said.student_logprobs + rng.normal(-0.5, 1, len(one))).astype(np.float32))
                    for one, said in zip(group.completions, row, strict=True)
                ),
            )
            for group, row in zip(self.groups, backend.score(self.groups, WHOLE), strict=True)
        ]
        scored = backend.score(self.groups, WHOLE, top=self.vocabulary)
        self.student, self.teacher = (
            [[self._dense(getattr(one, f"{policy}_top")) for one in row] for row in scored] for policy in POLICIES
        )

    def _dense(self, alternatives):
        logprobs = np.full((len(alternatives.tokens), self.vocabulary), np.nan)
        np.put_along_axis(logprobs, alternatives.tokens.astype(np.int64), alternatives.logprobs.astype(np.float64), 1)
        assert np.isfinite(logprobs).all()
        return logprobs

    def restored(self):
        backend = self.make()
        backend.load(self.folder)
        return backend

    def first(self, policy):
        """Log-probabilities [B, V] of the first token behind each student's prompt, of either policy.

        The teacher's own distributions are of the teacher's prompts; here both read the student's.
        """
        if policy == "student":
            return np.stack([rows[0][0] for rows in self.student])
        groups = [replace(group, teacher=group.student) for group in self.groups]
        return np.stack([self._dense(row[0].teacher_top)[0] for row in self.loaded.score(groups, WHOLE, top=self.vocabulary)])


POLICIES = ("student", "teacher")


@pytest.fixture(scope="module", params=["toy", *INSTALLED])
def case(request, tmp_path_factory):
    return Case(request.param, tmp_path_factory.mktemp("state"))


OBJECTIVES = [
    OBJECTIVE,
    *(replace(OBJECTIVE, alpha=alpha) for alpha in (0.0, 1.0, 0.2)),
    *(replace(OBJECTIVE, top_k=top_k) for top_k in (None, 3)),
    replace(OBJECTIVE, tail=False),
    *(replace(OBJECTIVE, ratio_clip=clip) for clip in (None, 4.0)),
    *(replace(OBJECTIVE, temperature=temperature) for temperature in (0.6, 1.7)),
    replace(OBJECTIVE, form="sampled"),
]


def test_every_part_of_the_objective_counts(case):
    """And the teacher reads its own prompt, the ratio the sampler's log-probabilities; with a gradient and without."""
    seen = set()
    for objective in OBJECTIVES:
        scored, accumulated = (getattr(case.loaded, verb)(case.groups, objective) for verb in ("score", "accumulate"))
        values = []
        for group, students, teachers, *rows in zip(case.groups, case.student, case.teacher, scored, accumulated, strict=True):
            for completion, student, teacher, *found in zip(group.completions, students, teachers, *rows, strict=True):
                expected = evaluate(student, teacher, completion.tokens, completion.logprobs, objective)
                for name in NAMES:
                    wanted = getattr(expected, name)
                    for one in found:
                        np.testing.assert_allclose(getattr(one, name), wanted, rtol=2e-4, atol=2e-5, err_msg=f"{name} of {objective}")
                values += (expected.ratio * expected.divergence).tolist()
        seen.add(tuple(f"{value:.3g}" for value in values))
    assert len(seen) == len(OBJECTIVES)
    case.loaded.apply(NOTHING)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_part_of_sampling_counts(case, policy):
    """The token of every uniform, by its inverse CDF; banned tokens are left out, and the policy is the one that was asked for."""
    logits = case.first(policy)
    likeliest = logits.argmax(1)
    uniforms = np.random.default_rng(1).random((3, 20, 1), np.float32)
    seen = set()
    for temperature in (1.0, 0.6, 0.0):
        for banned in ((), tuple(sorted({*likeliest.tolist(), 1}))):
            found = case.loaded.sample(case.prompts, uniforms, Sampling(temperature, (), banned), policy)
            kept = logits.copy()
            kept[:, list(banned)] = -np.inf
            s = log_softmax(kept / (temperature or 1.0))
            for group, row, draws in zip(found, s, uniforms[..., 0], strict=True):
                cumulative = np.exp(row).cumsum()
                for one, uniform in zip(group, draws, strict=True):
                    assert not one.finished
                    (token,) = one.tokens
                    if temperature == 0:
                        assert token == row.argmax()
                    elif np.abs(cumulative - uniform).min() > 1e-4:
                        assert token == np.searchsorted(cumulative, uniform, side="right")
                    assert one.logprobs[0] == pytest.approx(row[token], rel=1e-4, abs=1e-4)
            seen.add(tuple((int(one.tokens[0]), round(float(one.logprobs[0]), 4)) for group in found for one in group))
    assert len(seen) == 6
    other = case.first("teacher" if policy == "student" else "student")
    assert np.abs(np.exp(other) - np.exp(logits)).max() > 1e-2


def test_completions_end_at_a_stop_token_or_at_their_limit(case):
    uniforms = np.random.default_rng(2).random((3, 8, 6), np.float32)
    free = case.loaded.sample(case.prompts, uniforms, Sampling(1.0))
    assert {len(one) for group in free for one in group} == {6}
    stop = tuple({int(one.tokens[2]) for group in free for one in group[:2]})
    for group, whole in zip(case.loaded.sample(case.prompts, uniforms, Sampling(1.0, stop)), free, strict=True):
        for one, longer in zip(group, whole, strict=True):
            stops = np.flatnonzero(np.isin(longer.tokens, stop))
            length = stops[0] + 1 if len(stops) else 6
            assert one.tokens.tolist() == longer.tokens[:length].tolist()
            assert one.finished == bool(len(stops))
    short = case.loaded.sample(case.prompts, uniforms[:, :3, :2], Sampling(1.0))
    assert [[one.tokens.tolist() for one in group] for group in short] == [[one.tokens[:2].tolist() for one in row[:3]] for row in free]


def gradient(backend, groups):
    backend.accumulate(groups, OBJECTIVE)
    return backend.tensors("gradient")


def near(ours, theirs):
    assert ours.keys() == theirs.keys()
    whole = np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in theirs.values()))
    assert whole > 0
    return all(np.linalg.norm(ours[name] - value) <= 1e-4 * max(np.linalg.norm(value), 1e-2 * whole) for name, value in theirs.items())


@pytest.mark.parametrize("change", ["apply", "load"])
def test_nothing_that_a_rollout_kept_outlives_the_weights(change, case, tmp_path):
    """A backend may keep its pass over a rollout's prompts for the gradient along them; but not once the student is another one."""
    backend, uniforms = case.restored(), np.full((3, 2, 3), 0.5, np.float32)
    before = gradient(backend, case.groups)
    backend.sample(case.prompts, uniforms, Sampling(1.0))
    fresh = case.make()
    if change == "apply":
        assert backend.apply(STEP).taken
        backend.save(tmp_path)
        fresh.load(tmp_path)
    else:
        fresh.save(tmp_path)
        backend.load(tmp_path)
    expected = gradient(fresh, case.groups)
    assert not near(before, expected)
    assert near(gradient(backend, case.groups), expected)
    ours, theirs = (one.sample(case.prompts, uniforms, Sampling(1.0)) for one in (backend, fresh))
    assert texts(ours) == texts(theirs)


def texts(sampled):
    return [[one.tokens.tolist() for one in group] for group in sampled]


def test_what_a_rollout_kept_serves_its_own_prompts_alone(case):
    """Other prompts, some of them, or the same in another order: the gradient is that of a backend that never sampled."""
    backend, fresh = case.restored(), case.restored()
    for chosen in ([0, 1, 2], [2, 0, 1], [0], [1, 2]):
        groups = [case.groups[index] for index in chosen]
        expected = gradient(fresh, groups)
        for policy in POLICIES:
            backend.sample(case.prompts, np.full((3, 2, 3), 0.5, np.float32), Sampling(1.0), policy)
            assert near(gradient(backend, groups), expected)
            backend.apply(NOTHING)
        fresh.apply(NOTHING)
