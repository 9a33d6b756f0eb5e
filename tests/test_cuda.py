"""The torch backend on a GPU against itself on the CPU in float64: values, gradients, samples and a step, of every family.

A machine without a GPU skips all of it.
"""

from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU on this machine", allow_module_level=True)

import opd_torch
from opd.objective import Objective
from opd.types import ModelOptions, Sampling, Update
from opd_torch import sampling as rollout
from tests import random_models
from tests.torch_cases import loss_of, make_case, relative_error

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    return make_case(root, random_models.FAMILIES[request.param](root / "model"))


@pytest.fixture(scope="module")
def exact(case):
    return case.backend()


def on_gpu(case, dtype="float32"):
    backend = opd_torch.load_cuda(ModelOptions(case.folder, dtype))
    backend.load(case.state)
    return backend


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("split", [0, 1])
def test_value_and_gradient(case, exact, dtype, most, split):
    exact._gradient = {}
    wanted = loss_of(case.groups, exact.accumulate(case.groups, JSD))
    backend = on_gpu(case, dtype)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD, split)) == pytest.approx(wanted, rel=most)
    assert relative_error(backend.tensors("gradient"), exact.tensors("gradient")) < most


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_samples(case, exact, temperature):
    """Longer than a window and than what fresh buffers hold; some end early, so that rows leave."""
    prompts, uniforms = [group.student for group in case.groups[:4]], np.random.default_rng(5).random((4, 3, 150), dtype=np.float32)
    free = exact.sample(prompts, uniforms, Sampling(temperature))
    stop = tuple({int(one.tokens[9]) for one in chain(*free)} - {int(token) for token in free[1][0].tokens})
    wanted = exact.sample(prompts, uniforms, Sampling(temperature, stop))
    found = on_gpu(case).sample(prompts, uniforms, Sampling(temperature, stop))
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=2e-4)
        assert one.finished == other.finished


def test_a_step(case, exact, tmp_path):
    """And what is written of it; the CPU reads it."""
    backends = [on_gpu(case), case.backend("float32")]
    for backend in backends:
        backend.accumulate(case.groups, JSD)
        assert backend.apply(Update(1e-3)).taken
        backend.move_teacher(0.5)
    one, other = backends
    for kind in ("student", "teacher"):
        assert relative_error(one.tensors(kind), other.tensors(kind)) < 1e-3
    one.save(tmp_path)
    other.load(tmp_path)
    assert relative_error(one.tensors("teacher"), other.tensors("teacher")) == 0.0
    assert one.peak_memory > 0
    assert rollout.asks(torch.device("cuda"), rollout.ASK_EVERY - 1)
