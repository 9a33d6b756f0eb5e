"""MLX against torch: one checkpoint, the same numbers, and files of each that the other takes."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

import opd_mlx
import opd_torch
from opd.objective import Objective
from opd.types import Group, ModelOptions, Sampling, Update
from tests.support.mlx_cases import loss_of, make_case, relative_error
from tests.support.random_models import qwen3_vl

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """At these sizes more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("parity")
    return make_case(root, qwen3_vl(root / "model", seed=3))


@pytest.fixture
def both(case):
    backends = (
        opd_torch.load_cpu(ModelOptions(case.folder)),
        opd_mlx.load(ModelOptions(case.folder)),
    )
    for backend in backends:
        backend.load(case.state)
    return backends


def test_samples(case, both):
    prompts = [group.student for group in case.groups]
    uniforms = np.random.default_rng(0).random((5, 3, 8), dtype=np.float32)
    sampling = Sampling(1.0, case.encoder.stop, case.encoder.banned)
    theirs, ours = (list(chain(*backend.sample(prompts, uniforms, sampling))) for backend in both)
    assert sum(map(len, ours)) > 60
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


@pytest.mark.parametrize(
    "objective", [JSD, Objective(alpha=0.3, top_k=None, temperature=1.3), Objective(form="sampled")]
)
def test_statistics_and_gradients(case, both, objective):
    theirs, ours = (list(chain(*backend.accumulate(case.groups, objective))) for backend in both)
    for one, other in zip(ours, theirs, strict=True):
        for name in (
            "student_logprobs",
            "teacher_logprobs",
            "student_entropy",
            "teacher_entropy",
            "divergence",
        ):
            np.testing.assert_allclose(
                getattr(one, name), getattr(other, name), atol=1e-5, err_msg=name
            )
        np.testing.assert_allclose(one.ratio, other.ratio, rtol=1e-4)
    gradient, expected = both[1].tensors("gradient"), both[0].tensors("gradient")
    assert relative_error(gradient, expected) < 1e-4
    assert min(np.abs(value).max() for value in expected.values()) > 0


def test_alternatives(case, both):
    theirs, ours = (list(chain(*backend.score(case.groups, JSD, top=4))) for backend in both)
    for one, other in zip(ours, theirs, strict=True):
        for policy in ("student_top", "teacher_top"):
            np.testing.assert_array_equal(
                getattr(one, policy).tokens, getattr(other, policy).tokens
            )
            np.testing.assert_allclose(
                getattr(one, policy).logprobs, getattr(other, policy).logprobs, atol=1e-5
            )


def test_attention(case, both):
    """Of both policies; the group without tokens shows the last token of its prompt."""
    prompts = [group.student for group in case.groups]
    members = [[one for one in group.completions if len(one)] for group in case.groups]
    for policy in ("student", "teacher"):
        theirs, ours = (list(chain(*backend.attend(prompts, members, policy))) for backend in both)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)
            assert other.max() > 0


def test_ten_steps(case, both):
    """On replayed completions the losses fall together, and the parameters end together."""
    weight = np.float32(1 / sum(group.tokens for group in case.groups))
    groups = [
        Group(
            group.student,
            group.teacher,
            group.completions,
            tuple(np.full(len(one), weight) for one in group.completions),
        )
        for group in case.groups
    ]
    start = both[0].tensors("student")
    losses = []
    for backend in both:
        losses.append([])
        for _ in range(10):
            losses[-1].append(loss_of(groups, backend.accumulate(groups, JSD)))
            assert backend.apply(Update(3e-4, weight_decay=0.01)).taken
            backend.move_teacher(0.05)
    np.testing.assert_allclose(losses[1], losses[0], atol=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]
    for kind in ("student", "teacher"):
        moved, expected = (
            {name: value - start[name] for name, value in backend.tensors(kind).items()}
            for backend in both[::-1]
        )
        assert relative_error(moved, expected) < 0.02


@pytest.mark.parametrize("first", [0, 1])
def test_a_checkpoint_resumes_on_the_other(case, both, tmp_path, first):
    """Parameters, moments and step count: the next step is the same."""
    writer, reader = both[first], both[1 - first]
    for _ in range(2):
        writer.accumulate(case.groups, JSD)
        writer.apply(Update(1e-3))
        writer.move_teacher(0.3)
    writer.save(tmp_path)
    reader.load(tmp_path)
    for kind in ("student", "teacher"):
        found, expected = reader.tensors(kind), writer.tensors(kind)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(value, expected[name]) for name, value in found.items())
    before = writer.tensors("student")
    for backend in both:
        backend.accumulate(case.groups[:1], JSD)
        backend.apply(Update(1e-3))
    moved, expected = (
        {name: value - before[name] for name, value in backend.tensors("student").items()}
        for backend in (reader, writer)
    )
    assert relative_error(moved, expected) < 1e-3
