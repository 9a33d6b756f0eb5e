"""Completions that run a few at a time, on every backend and for every family.

The same statistics and gradient as at once; and a call that fails leaves nothing half done.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest

pytest.importorskip("torch")  # random models of most families are written with it

from opd.errors import OutOfMemory
from opd.objective import Objective
from opd.types import STATISTICS, Completion, Group
from tests.conftest import INSTALLED, twin_of
from tests.support import random_models
from tests.support.cases import norm_of, relative_error, watch

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def case(request, tmp_path_factory):
    """Groups of 3, 1, 2, 0, 3 and 2 completions, some of them empty; one has nothing else."""
    root, write = tmp_path_factory.mktemp(request.param), random_models.FAMILIES[request.param]
    case = twin_of(INSTALLED[0]).make_case(root, random_models.raise_norms(write(root / "model")))
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    nothing = np.zeros(0, np.float32)
    first, *others, last = case.groups

    def with_empty(group: Group, place: int) -> Group:
        completions, weights = list(group.completions), list(group.weights)
        completions[place], weights[place] = empty, nothing
        return replace(group, completions=tuple(completions), weights=tuple(weights))

    none = Group(first.student, first.teacher, (empty, empty), (nothing, nothing))
    return replace(case, groups=[with_empty(first, 1), none, *others, with_empty(last, 0)])


@pytest.fixture(scope="module")
def whole(case):
    """The case's model on a backend, and statistics and gradient of all completions at once."""

    @cache
    def compute(name):
        twin = twin_of(name)
        with twin.exactly():
            loaded = twin.loaded(case)
            one = loaded.backend()
            statistics = one.accumulate(case.groups, JSD)
        return loaded, statistics, one.tensors("gradient")

    return compute


@pytest.mark.parametrize("recomputed", [False, True])
def test_parts_of_a_group_add_up(case, twin, whole, monkeypatch, recomputed):
    """Statistics and gradient, on top of a gradient that is there already; prompts run once."""
    loaded, statistics, gradient = whole(twin.NAME)
    with twin.exactly():
        settings = {"checkpoint_above": 0 if recomputed else 2**60}
        first = loaded.backend(**settings)
        first.accumulate(case.groups[2:3], JSD)
        before, prompts = first.tensors("gradient"), []
        name = f"{twin.PACKAGE}.gradient.prefill"
        watch(monkeypatch, name, lambda _, prefixes, *__: prompts.extend(prefixes.sources))
        for split in (1, 2, 3):
            prompts.clear()
            backend = loaded.backend(**settings)
            backend.accumulate(case.groups[2:3], JSD)
            earlier = len(prompts)
            rows = backend.accumulate(case.groups, JSD, split)
            used = sum(any(map(len, group.completions)) for group in case.groups)
            assert len(prompts) - earlier == 2 * used
            expected = {name: value + before[name] for name, value in gradient.items()}
            assert relative_error(backend.tensors("gradient"), expected) < twin.SPLIT
            for row, group, wanted in zip(rows, case.groups, statistics, strict=True):
                lengths = [len(completion) for completion in group.completions]
                assert [len(one.divergence) for one in row] == lengths
                for one, theirs in zip(row, wanted, strict=True):
                    for field in STATISTICS:
                        ours, other = getattr(one, field), getattr(theirs, field)
                        np.testing.assert_allclose(ours, other, **twin.STATISTICS)


@pytest.mark.parametrize(
    ("place", "call"), [("gradient.divergence_head", 2), ("objective.HeadResult.records", 1)]
)
def test_a_call_that_fails(case, twin, whole, monkeypatch, place, call):
    """It leaves no gradient, and no part of one; of earlier calls neither. A step begins anew."""
    loaded, _, gradient = whole(twin.NAME)
    with twin.exactly():
        backend, calls = loaded.backend(), []
        backend.accumulate(case.groups, JSD, 1)
        assert norm_of(backend.tensors("gradient")) > 0

        def fail(*_, **__):
            calls.append(1)
            if len(calls) == call:
                raise twin.FULL_MEMORY

        watch(monkeypatch, f"{twin.PACKAGE}.{place}", fail)
        with pytest.raises(OutOfMemory, match=r"out of memory: "):
            backend.accumulate(case.groups, JSD, 1)
        assert norm_of(backend.tensors("gradient")) == 0
        backend.accumulate(case.groups, JSD, 2)
        assert relative_error(backend.tensors("gradient"), gradient) < twin.SPLIT
        backend.accumulate(case.groups, JSD, 1)
    double = {name: 2 * value for name, value in gradient.items()}
    assert relative_error(backend.tensors("gradient"), double) < twin.SPLIT
