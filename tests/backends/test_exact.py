"""Every backend on Qwen3-VL against its own stock library, row by row: values and all gradients.

torch against transformers in float64 and autograd; MLX against mlx-vlm in float32 and the numpy
objective. `test_families.py` holds scores, samples and files.
"""

from __future__ import annotations

from functools import cache
from itertools import chain

import numpy as np
import pytest

from opd.objective import Objective
from opd.types import Sampling
from tests.conftest import twin_of
from tests.support.cases import loss_of, relative_error, watch
from tests.support.random_models import qwen3_vl

JSD = Objective(alpha=0.5, top_k=20)
OBJECTIVES = [
    JSD,
    Objective(alpha=0.3, top_k=None, temperature=1.3),
    Objective(alpha=1.0, top_k=30, tail=False),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A backend's case, and its model, loaded once."""

    @cache
    def make(name):
        root = tmp_path_factory.mktemp(name)
        case = twin_of(name).make_case(root, qwen3_vl(root / "model"))
        return case, case.loaded()

    return make


@pytest.fixture
def case(made, twin):
    return made(twin.NAME)[0]


@pytest.fixture
def backend(made, twin):
    return made(twin.NAME)[1].backend()


@pytest.fixture(scope="module")
def expected(made):
    """Loss and gradients of an objective by the backend's stock library."""

    @cache
    def compute(name, objective=JSD):
        case = made(name)[0]
        return twin_of(name).plain_loss_and_gradients(case, case.groups, objective)

    return compute


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_every_gradient(case, backend, twin, expected, objective):
    loss, gradients = expected(twin.NAME, objective)
    found = loss_of(case.groups, backend.accumulate(case.groups, objective))
    assert found == pytest.approx(loss, rel=twin.LOSS)
    assert relative_error(backend.tensors("gradient"), gradients) < twin.GRADIENT
    smallest = min(np.abs(value).max() for value in gradients.values())
    assert smallest > 0, "a parameter without gradient proves nothing"


def test_float32(case, twin, expected):
    backend = case.backend("float32")
    loss, gradients = expected(twin.NAME)
    found = loss_of(case.groups, backend.accumulate(case.groups, JSD))
    assert found == pytest.approx(loss, rel=1e-5)
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-4


def test_untied_head_without_deepstack(twin, tmp_path):
    sizes = {"tied": False, "deepstack": 0, "layers": 2, "kv_heads": 4}
    case = twin.make_case(tmp_path, qwen3_vl(tmp_path / "model", seed=1, **sizes))
    backend = case.backend()
    loss, gradients = twin.plain_loss_and_gradients(case, case.groups, JSD)
    found = loss_of(case.groups, backend.accumulate(case.groups, JSD))
    assert found == pytest.approx(loss, rel=twin.LOSS)
    assert "lm_head.weight" in gradients
    assert relative_error(backend.tensors("gradient"), gradients) < twin.GRADIENT


def test_prompts_of_one_length(case, backend, twin):
    """Where nothing is padded other code runs: no mask, no gathering, equal counts."""
    groups = [case.groups[0], case.groups[4]]
    assert len(groups[0].student) == len(groups[1].student)
    loss, gradients = twin.plain_loss_and_gradients(case, groups, JSD)
    found = loss_of(groups, backend.accumulate(groups, JSD))
    assert found == pytest.approx(loss, rel=twin.LOSS)
    assert relative_error(backend.tensors("gradient"), gradients) < twin.GRADIENT


@pytest.mark.parametrize("cut", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_cuts_into_calls_change_nothing(case, made, backend, twin, expected, cut):
    together = made(twin.NAME)[1].backend().accumulate(case.groups, JSD)
    apart, start = [], 0
    for size in cut:
        apart += backend.accumulate(case.groups[start : start + size], JSD)
        start += size
    gradients = expected(twin.NAME)[1]
    assert relative_error(backend.tensors("gradient"), gradients) < twin.GRADIENT
    bounds = {"rtol": 1e-5} if twin.DTYPE == "float64" else {"rtol": 1e-4, "atol": 1e-6}
    for ours, theirs in zip(apart, together, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.divergence, other.divergence, **bounds)
            near = {"rtol": 1e-5} if twin.DTYPE == "float64" else {"atol": 1e-5}
            np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, **near)


def test_a_completion_ends_with_its_first_stop_token(case, backend):
    prompts = [group.student for group in case.groups[:3]]
    uniforms = np.random.default_rng(2).random((3, 2, 8), dtype=np.float32)
    free = backend.sample(prompts, uniforms, Sampling(1.0))
    stop = int(free[0][0].tokens[3])
    stopped = backend.sample(prompts, uniforms, Sampling(1.0, (stop,)))
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        places = np.flatnonzero(before.tokens == stop)
        length = places[0] + 1 if len(places) else len(before)
        assert after.finished == bool(len(places))
        np.testing.assert_array_equal(after.tokens, before.tokens[:length])
        np.testing.assert_array_equal(after.logprobs, before.logprobs[: len(after)])


def test_only_completion_rows_meet_the_head(case, twin, tmp_path, monkeypatch):
    """In the gradient the groups' tokens, once; in a rollout a row a completion and step."""
    backend, rows = case.backend("float32"), []
    for module, name in (("gradient", "divergence_head"), ("sampling", "draw")):
        seen = lambda hidden, *_, **__: rows.append(len(hidden))
        watch(monkeypatch, f"{twin.PACKAGE}.{module}.{name}", seen)
    backend.accumulate(case.groups, Objective(top_k=20))
    prompts = [group.student for group in case.groups]
    backend.sample(prompts, np.full((5, 2, 3), 0.5, np.float32), Sampling())
    assert rows == [sum(group.tokens for group in case.groups)] + [5 * 2] * 3
