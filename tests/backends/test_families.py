"""Every family on MLX against torch: one checkpoint, the same log-probabilities, divergence, gradient and samples."""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

pytest.importorskip("mlx.core")
torch = pytest.importorskip("torch")

import opd_torch
from opd.types import ModelOptions, Sampling
from tests.backends.mlx.test_families import JSD, make_case
from tests.support import random_models
from tests.support.mlx_cases import clone, loss_of, relative_error


@pytest.fixture(scope="module", params=[name for name in random_models.FAMILIES if name != "qwen3_vl"])
def both(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    case = make_case(root, random_models.FAMILIES[request.param](root / "model"))
    other = opd_torch.load_cpu(ModelOptions(case.folder))
    other.load(case.state)  # written by MLX
    return case, clone(case.loaded), other


def test_statistics_and_gradients(both):
    case, *backends = both
    ours, theirs = (list(backend.accumulate(case.groups, JSD)) for backend in backends)
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        for name in ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "divergence"):
            np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=case.near, err_msg=name)
    assert loss_of(case.groups, ours) == pytest.approx(loss_of(case.groups, theirs), rel=1e-4)
    gradients = [backend.tensors("gradient") for backend in backends]
    assert relative_error(*gradients) < 1e-4


def test_samples(both):
    case, *backends = both
    uniforms = np.random.default_rng(0).random((len(case.groups), 2, 20), dtype=np.float32)
    sampling = Sampling(1.0, case.encoder.stop, case.encoder.banned)
    ours, theirs = (chain(*backend.sample([group.student for group in case.groups], uniforms, sampling)) for backend in backends)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=case.near)


def test_a_checkpoint_of_torch_resumes_on_mlx(both, tmp_path):
    _, ours, theirs = both
    theirs.save(tmp_path)
    other = clone(ours)
    other.load(tmp_path)
    for kind in ("student", "teacher"):
        found, expected = other.tensors(kind), theirs.tensors(kind)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(value, expected[name]) for name, value in found.items())
