"""The conformance suite: checks that a backend keeps the protocol, through the protocol alone.

`check(make, pairs, stop, banned)` runs all checks, for each of which `make` loads a new backend,
and returns the error and the bound of each check. A backend is correct if all checks pass.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd.backend import Backend
from opd.objective import Objective
from opd.randomness import uniforms
from opd.types import (
    STATISTICS,
    Completion,
    FloatArray,
    Group,
    Prompt,
    Sampling,
    TokenStatistics,
    Update,
)

Tensors = dict[str, NDArray[np.float32]]

VALUE, GRADIENT, EXACT = 1e-5, 1e-4, 0.0
"""Bounds of relative errors in float32: of per-token values, of gradients, and of values that must
be equal to the bit."""


@dataclass(frozen=True)
class Result:
    """The result of one check: the largest relative error, and the bound of that error."""

    name: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the bound."""
        return bool(self.error <= self.bound)


@dataclass(frozen=True)
class Material:
    """The input of the checks: `pairs` of a student and a teacher prompt, of unequal lengths, and
    the ids of tokens that end a completion (`stop`) or never appear (`banned`)."""

    make: Callable[[], Backend]
    pairs: Sequence[tuple[Prompt, Prompt]]
    stop: tuple[int, ...]
    banned: tuple[int, ...]
    max_tokens: int = 5

    def sample(
        self, backend: Backend, temperature: float = 1.0, seed: int = 0
    ) -> list[list[Completion]]:
        """Three completions of each student prompt."""
        drawn = uniforms(seed, 1, range(len(self.pairs)), 3, self.max_tokens)
        return backend.sample(
            [student for student, _ in self.pairs],
            drawn,
            Sampling(temperature, self.stop, self.banned),
        )

    @cached_property
    def groups(self) -> list[Group]:
        """Groups with unequal numbers and lengths of completions and with unequal weights. A
        backend of their own samples them once for all checks. The log-probabilities of the sampler
        are changed at random, so that ratios are not 1."""
        rng = np.random.default_rng(0)
        made = []
        for index, ((student, teacher), sampled) in enumerate(
            zip(self.pairs, self.sample(self.make()), strict=True)
        ):
            completions = [
                replace(
                    one,
                    tokens=one.tokens[: 1 + (index + place) % self.max_tokens],
                    logprobs=one.logprobs[: 1 + (index + place) % self.max_tokens],
                )
                for place, one in enumerate(sampled[: 1 + index % 3])
            ]
            forged = [
                replace(one, logprobs=one.logprobs + rng.normal(size=len(one)).astype(np.float32))
                for one in completions
            ]
            weights = [rng.uniform(0.1, 1.0, size=len(one)).astype(np.float32) for one in forged]
            made.append(Group(student, teacher, tuple(forged), tuple(weights)))
        return made


def relative_error(ours: Tensors, theirs: Tensors) -> float:
    """Largest ||a - b|| / max(||b||, 1e-3 * global norm of b) over all tensors; infinite if names
    or shapes differ."""
    if {name: value.shape for name, value in ours.items()} != {
        name: value.shape for name, value in theirs.items()
    }:
        return np.inf
    everything = float(
        np.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in theirs.values()))
    )
    return max(
        float(np.linalg.norm(ours[name].astype(np.float64) - value))
        / max(float(np.linalg.norm(value)), 1e-3 * everything, 1e-30)
        for name, value in theirs.items()
    )


def statistics_error(
    ours: Iterable[Sequence[TokenStatistics]], theirs: Iterable[Sequence[TokenStatistics]]
) -> float:
    """Largest absolute difference, in units of max(1, |b|), of all statistics of all tokens."""
    pairs = [
        (a, b)
        for ours_row, theirs_row in zip(ours, theirs, strict=True)
        for a, b in zip(ours_row, theirs_row, strict=True)
    ]
    return max(
        _difference(getattr(a, name), getattr(b, name)) for a, b in pairs for name in STATISTICS
    )


def check(
    make: Callable[[], Backend],
    pairs: Sequence[tuple[Prompt, Prompt]],
    stop: tuple[int, ...],
    banned: tuple[int, ...],
) -> list[Result]:
    """Runs every check. `pairs`: at least three, with prompts of unequal lengths. `stop`, `banned`:
    token ids, as those of an encoder."""
    material = Material(make, pairs, stop, banned)
    return [Result(name, run(material), bound) for name, run, bound in CHECKS]


def rows_equal_groups(material: Material) -> float:
    """A group of n completions has the statistics and gradient of n groups of one, which a backend
    computes that has not sampled."""
    backend, groups = material.make(), material.groups
    material.sample(backend)
    rows = [
        Group(group.student, group.teacher, (one,), (weights,))
        for group in groups
        for one, weights in zip(group.completions, group.weights, strict=True)
    ]
    together = backend.accumulate(groups, OBJECTIVE)
    gradient = backend.tensors("gradient")
    other = material.make()
    apart = [row for group in rows for row in other.accumulate([group], OBJECTIVE)]
    statistics = statistics_error([[one] for row in together for one in row], apart)
    return max(relative_error(gradient, other.tensors("gradient")), statistics * GRADIENT / VALUE)


def split_groups_are_whole(material: Material) -> float:
    """Completions of a group that run a few at a time have the statistics and gradient of
    completions that run together."""
    backend, other = material.make(), material.make()
    groups = material.groups
    whole = statistics_error(
        backend.accumulate(groups, OBJECTIVE), other.accumulate(groups, OBJECTIVE, split=1)
    )
    gradient = relative_error(other.tensors("gradient"), backend.tensors("gradient"))
    backend.accumulate(groups, OBJECTIVE, split=2)  # adds to the gradient
    twice = {name: 2 * value for name, value in other.tensors("gradient").items()}
    return max(
        gradient, relative_error(backend.tensors("gradient"), twice), whole * GRADIENT / VALUE
    )


def a_prefill_changes_nothing(material: Material) -> float:
    """Prompts that run once, for sampling and the gradient, give the completions, statistics and
    gradient of prompts that run twice. A prefill serves one step with the same prompts and weights;
    another use raises ValueError."""
    backend, other = material.make(), material.make()
    prompts = [student for student, _ in material.pairs]
    prefill = backend.prefill(prompts)
    if prefill is None:
        return 0.0
    drawn = uniforms(0, 1, range(len(prompts)), 3, material.max_tokens)
    sampling = Sampling(1.0, material.stop, material.banned)
    shared = backend.sample(prompts, drawn, sampling, prefill=prefill)
    alone = other.sample(prompts, drawn, sampling)
    for one, another in zip(chain(*shared), chain(*alone), strict=True):
        if not np.array_equal(one.tokens, another.tokens):
            return np.inf
    groups = material.groups[::-1]
    if not _refused(lambda: backend.accumulate(groups, OBJECTIVE, prefill=prefill)):
        return np.inf
    prefill.order = tuple(range(len(prompts)))[::-1]
    statistics = statistics_error(
        backend.accumulate(groups, OBJECTIVE, prefill=prefill), other.accumulate(groups, OBJECTIVE)
    )
    gradient = relative_error(backend.tensors("gradient"), other.tensors("gradient"))
    if not _refused(lambda: backend.accumulate(groups, OBJECTIVE, prefill=prefill)):
        return np.inf
    stale = other.prefill(prompts)
    other.apply(Update(1e-2))
    if not _refused(lambda: other.sample(prompts, drawn, sampling, prefill=stale)):
        return np.inf
    return max(gradient, statistics * GRADIENT / VALUE)


def calls_add_up(material: Material) -> float:
    """Any cut of a step into calls accumulates the same gradient, in any order."""
    backend, other = material.make(), material.make()
    groups = material.groups
    backend.accumulate(groups, OBJECTIVE)
    other.accumulate(groups[1:][::-1], OBJECTIVE)
    other.accumulate(groups[:1], OBJECTIVE)
    return relative_error(other.tensors("gradient"), backend.tensors("gradient"))


def score_is_accumulate_without_gradient(material: Material) -> float:
    """`score` gives the statistics of `accumulate` and adds no gradient; its first alternative is
    the most likely token."""
    backend = material.make()
    groups = material.groups
    scored = backend.score(groups, OBJECTIVE, top=2)
    if any(np.abs(value).max() for value in backend.tensors("gradient").values()):
        return np.inf
    for row in scored:
        for one in row:
            if one.student_top is None or one.teacher_top is None:
                return np.inf
            if (np.diff(one.student_top.logprobs) > 0).any() or (
                one.student_top.logprobs[:, 0] < one.student_logprobs - VALUE
            ).any():
                return np.inf
    return statistics_error(scored, backend.accumulate(groups, OBJECTIVE))


def on_policy_ratio_is_one(material: Material) -> float:
    """Without banned tokens, the sampler's log-probabilities are the student's log-probabilities of
    the same tokens."""
    backend = material.make()
    free = replace(material, banned=())
    groups = [
        Group(
            student,
            teacher,
            tuple(sampled),
            tuple(np.ones(len(one), np.float32) for one in sampled),
        )
        for (student, teacher), sampled in zip(material.pairs, free.sample(backend), strict=True)
    ]
    ratios = [
        one.ratio - 1
        for row in backend.score(groups, replace(OBJECTIVE, temperature=1.0))
        for one in row
    ]
    return float(np.abs(np.concatenate(ratios)).max())


def sampling_keeps_the_rules(material: Material) -> float:
    """Completions have no banned token and a stop token only at the end; equal uniforms draw equal
    tokens, whatever other prompts are sampled together. Returns 0 or infinity."""
    backend = material.make()
    sampled, again = material.sample(backend), material.sample(backend)
    student, _ = material.pairs[-1]
    drawn = uniforms(0, 1, [len(material.pairs) - 1], 3, material.max_tokens)
    alone = backend.sample(
        [student], drawn, Sampling(1.0, material.stop, material.banned), policy="teacher"
    )[0]
    for one, other in zip([*chain(*sampled), *alone], [*chain(*again), *sampled[-1]], strict=True):
        stops = np.isin(one.tokens, material.stop)
        whole = stops[-1] if one.finished else len(one) == material.max_tokens
        if (
            stops[:-1].any()
            or not whole
            or np.isin(one.tokens, material.banned).any()
            or not np.array_equal(one.tokens, other.tokens)
        ):
            return np.inf
    greedy, reseeded = material.sample(backend, 0.0), material.sample(backend, 0.0, seed=1)
    same = all(
        np.array_equal(a.tokens, b.tokens)
        for a, b in zip(chain(*greedy), chain(*reseeded), strict=True)
    )
    return 0.0 if same else np.inf


def attention_is_of_its_own_rows(material: Material) -> float:
    """Every row's attention to visual tokens is at least 0 and sums to at most 1, and depends on no
    later token and on no other prompt or completion. A prompt without completions shows its last
    token; an empty completion raises ValueError."""
    backend = material.make()
    if not backend.attends:
        return 0.0
    prompts, sampled = [student for student, _ in material.pairs], material.sample(backend)
    together = backend.attend(prompts, sampled)
    errors = [0.0]
    for prompt, members, weights in zip(prompts, sampled, together, strict=True):
        alone = backend.attend([prompt], [[]])[0][0]
        for one, found in zip(members, weights, strict=True):
            shape = (len(alone), len(one), len(prompt.visual.index))
            if found.shape != shape or found.dtype != np.float32:
                return np.inf
            if found.min() < 0 or found.sum(-1).max() > 1 + VALUE:
                return np.inf
            end = -(-len(one) // 2)
            half = replace(one, tokens=one.tokens[:end], logprobs=one.logprobs[:end])
            errors += [
                _difference(backend.attend([prompt], [[half]])[0][0], found[:, :end]),
                _difference(alone, found[:, :1]),
            ]
    nothing = replace(sampled[0][0], tokens=np.zeros(0, np.int32), logprobs=np.zeros(0, np.float32))
    if not _refused(lambda: backend.attend(prompts[:1], [[nothing]])):
        return np.inf
    return max(errors)


def the_gradient_is_the_losss_derivative(material: Material) -> float:
    """Along its own direction, the gradient predicts how the loss changes (central difference)."""
    backend = material.make()
    groups = material.groups
    # The top k and the clipped ratio are constants in the gradient, but would change the loss.
    smooth = replace(OBJECTIVE, top_k=None, ratio_clip=None)

    def loss(statistics: Sequence[Sequence[TokenStatistics]]) -> float:
        pairs = [
            (w, one)
            for group, row in zip(groups, statistics, strict=True)
            for w, one in zip(group.weights, row, strict=True)
        ]
        return float(
            sum((w.astype(np.float64) * one.ratio * one.divergence).sum() for w, one in pairs)
        )

    value = loss(backend.accumulate(groups, smooth))
    square = sum(
        float((gradient.astype(np.float64) ** 2).sum())
        for gradient in backend.tensors("gradient").values()
    )
    # With a huge epsilon AdamW's first step is plain descent by learning_rate / epsilon.
    epsilon, change = 1e6, 1e-2 * value
    moved = []
    for sign in (1, -1):
        other = material.make()
        other.accumulate(groups, smooth)
        other.apply(Update(sign * epsilon * change / square, epsilon=epsilon, gradient_clip=None))
        moved.append(loss(other.score(groups, smooth)))
    return abs((moved[1] - moved[0]) / (2 * change) - 1)


def weights_scale_the_gradient(material: Material) -> float:
    """Tripled weights triple the gradient, and a token of weight 0 adds nothing.

    Doubled weights would not show the error of a backend that takes every weight as 1: with the
    groups of weight 0 the gradient of that backend doubles too.
    """
    backend, other = material.make(), material.make()
    groups = material.groups
    backend.accumulate(groups, OBJECTIVE)
    tripled = [
        replace(group, weights=tuple(3 * weights for weights in group.weights)) for group in groups
    ]
    silent = [
        replace(group, weights=tuple(0 * weights for weights in group.weights)) for group in groups
    ]
    other.accumulate([*tripled, *silent], OBJECTIVE)
    return relative_error(
        other.tensors("gradient"),
        {name: 3 * value for name, value in backend.tensors("gradient").items()},
    )


def a_step_is_adamw(material: Material) -> float:
    """Two clipped AdamW steps change the parameters as the formula says, in float64 numpy."""
    backend = material.make()
    groups = material.groups
    before = backend.tensors("student")
    expected = {name: value.astype(np.float64) for name, value in before.items()}
    first: dict[str, NDArray[np.float64]] = {
        name: np.zeros_like(value) for name, value in expected.items()
    }
    second: dict[str, NDArray[np.float64]] = {
        name: np.zeros_like(value) for name, value in expected.items()
    }
    clip = 0.0
    for step in (1, 2):
        backend.accumulate(groups, OBJECTIVE)
        gradient = {
            name: value.astype(np.float64) for name, value in backend.tensors("gradient").items()
        }
        norm = np.sqrt(sum((value**2).sum() for value in gradient.values()))
        clip = clip or float(norm) / 2
        # With a large epsilon gradients that are rounding noise have no effect.
        result = backend.apply(Update(1e-3, (0.9, 0.99), 1e-4, 0.1, clip))
        if not result.taken or abs(result.gradient_norm - norm) > GRADIENT * norm:
            return np.inf
        for name, value in expected.items():
            g = gradient[name] * min(1.0, clip / norm)
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.99 * second[name] + 0.01 * g**2
            moved = (
                first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.99**step)) + 1e-4)
            )
            expected[name] = value - 1e-3 * (moved + 0.1 * value)
    after = backend.tensors("student")
    return relative_error(
        {name: after[name] - before[name] for name in after},
        {name: (expected[name] - before[name]).astype(np.float32) for name in after},
    )


def a_step_that_is_not_finite_changes_nothing(material: Material) -> float:
    """`apply` refuses a gradient with a NaN: parameters stay, and the gradient is cleared. Returns
    0 or infinity."""
    backend = material.make()
    groups = material.groups
    before = backend.tensors("student")
    backend.accumulate(
        [
            replace(group, weights=tuple(weights * np.nan for weights in group.weights))
            for group in groups
        ],
        OBJECTIVE,
    )
    if backend.apply(Update(1e-2)).taken or any(
        np.abs(value).max() > 0 for value in backend.tensors("gradient").values()
    ):
        return np.inf
    return relative_error(backend.tensors("student"), before)


def the_teacher_moves_by_its_rate(material: Material) -> float:
    """The teacher stays while the student steps, then moves by the rate; rate 1 makes it the
    student."""
    backend = material.make()
    groups = material.groups
    start = backend.tensors("teacher")
    if relative_error(start, backend.tensors("student")) > 0:
        return np.inf
    backend.accumulate(groups, OBJECTIVE)
    backend.apply(Update(1e-2))
    student = backend.tensors("student")
    backend.move_teacher(0.0)
    if relative_error(backend.tensors("teacher"), start) > 0 or relative_error(student, start) == 0:
        return np.inf
    backend.move_teacher(0.25)
    moved = relative_error(
        backend.tensors("teacher"),
        {name: start[name] + 0.25 * (student[name] - start[name]) for name in start},
    )
    backend.move_teacher(1.0)
    return max(moved, relative_error(backend.tensors("teacher"), student))


def a_checkpoint_restores_all(material: Material) -> float:
    """After save and load, the next step is the same to the bit, teacher and moments included."""
    backend = material.make()
    groups = material.groups

    def step(backend: Backend) -> None:
        backend.accumulate(groups, OBJECTIVE)
        backend.apply(Update(1e-2))
        backend.move_teacher(0.3)

    step(backend)
    with tempfile.TemporaryDirectory() as folder:
        backend.save(Path(folder))
        restored = material.make()
        restored.load(Path(folder))
    step(backend)
    step(restored)
    return max(
        relative_error(restored.tensors("student"), backend.tensors("student")),
        relative_error(restored.tensors("teacher"), backend.tensors("teacher")),
    )


OBJECTIVE = Objective(alpha=0.5, top_k=7, temperature=1.3)
"""Another top k and temperature than the defaults, which a backend may take by mistake."""

CHECKS: tuple[tuple[str, Callable[[Material], float], float], ...] = (
    ("a group equals its rows", rows_equal_groups, GRADIENT),
    ("split groups are whole", split_groups_are_whole, GRADIENT),
    ("a prefill changes nothing", a_prefill_changes_nothing, GRADIENT),
    ("calls add up", calls_add_up, GRADIENT),
    ("score is accumulate without gradient", score_is_accumulate_without_gradient, VALUE),
    ("on-policy ratio is one", on_policy_ratio_is_one, 5 * VALUE),
    ("sampling keeps the rules", sampling_keeps_the_rules, EXACT),
    ("attention is of its own rows", attention_is_of_its_own_rows, VALUE),
    ("the gradient is the loss's derivative", the_gradient_is_the_losss_derivative, 2e-2),
    ("weights scale the gradient", weights_scale_the_gradient, GRADIENT),
    ("a step is AdamW", a_step_is_adamw, 10 * GRADIENT),
    ("a step that is not finite changes nothing", a_step_that_is_not_finite_changes_nothing, EXACT),
    ("the teacher moves by its rate", the_teacher_moves_by_its_rate, VALUE),
    ("a checkpoint restores all", a_checkpoint_restores_all, EXACT),
)


def _refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except ValueError:
        return True
    return False


def _difference(a: FloatArray, b: FloatArray) -> float:
    return (
        float((np.abs(a - b) / np.maximum(1, np.abs(b))).max(initial=0.0))
        if a.shape == b.shape
        else np.inf
    )
