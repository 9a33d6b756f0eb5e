"""The torch backend on a GPU against itself on the CPU in float64: values, gradients, samples and a
step, of every family.

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
from opd.groups import drop_empty
from opd.objective import Objective
from opd.types import AdapterOptions, ModelOptions, Sampling, Update
from opd_torch.batch import lay_out
from opd_torch.device import record_graph, this_device
from opd_torch.footprint import activation_bytes
from tests.support import random_models
from tests.support.torch_cases import StepByStep, loss_of, make_case, opened, relative_error

JSD = Objective(alpha=0.5, top_k=None)  # of a support, half precision may choose another


MODELS = {
    **random_models.FAMILIES,
    "of heads that flash attention takes": lambda path: random_models.qwen3_vl(path, head_dim=16),
}


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param.split()[0])
    made = make_case(root, MODELS[request.param](root / "model"))
    made.kind = request.param
    return made


@pytest.fixture(scope="module")
def double(case):
    return case.loaded()


@pytest.fixture
def exact(double):
    return double.backend()


def on_gpu(case, dtype="float32", **settings):
    options = ModelOptions(case.folder, dtype)
    loaded = opened(options, case.state, device="cuda:0", **settings)
    return loaded.backend(loaded.model)


@pytest.mark.parametrize("split", [0, 1])
def test_value_and_gradient(case, exact, split):
    wanted = loss_of(case.groups, exact.accumulate(case.groups, JSD))
    backend = on_gpu(case)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD, split)) == pytest.approx(
        wanted, rel=1e-5
    )
    assert relative_error(backend.tensors("gradient"), exact.tensors("gradient")) < 1e-4


@pytest.mark.parametrize("again", [0.0, 0.5, 1.0])
def test_half_precision(case, exact, again):
    """Whatever share of the layers is computed again."""
    wanted = loss_of(case.groups, exact.accumulate(case.groups, JSD))
    settings = {"checkpoint_above": 2**60}
    if again:
        options, used = ModelOptions(case.folder, "bfloat16"), drop_empty(case.groups)
        completions = [[one.tokens for one in group.completions] for group in used]
        prompts = [group.student for group in used]
        batch = lay_out(prompts, completions, torch.device("cuda:0"))
        held = activation_bytes(opened(options, device="cuda:0").model, batch)
        settings = {"checkpoint_above": 0, "free_bytes": int((1 - again) * held)}
    backend = on_gpu(case, "bfloat16", **settings)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(
        wanted, rel=0.02
    )
    ours, theirs = (one.tensors("gradient") for one in (backend, exact))
    found, wanted = (
        np.concatenate([gradient[name].ravel() for name in theirs]) for gradient in (ours, theirs)
    )
    assert np.linalg.norm(found - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_samples(case, exact, temperature):
    """Longer than a window and than what fresh buffers hold; some end early, so that rows leave."""
    prompts, uniforms = (
        [group.student for group in case.groups[:4]],
        np.random.default_rng(5).random((4, 3, 300), dtype=np.float32),
    )
    free = exact.sample(prompts, uniforms, Sampling(temperature))
    stop = tuple(
        {int(one.tokens[9]) for one in chain(*free)} - {int(token) for token in free[1][0].tokens}
    )
    wanted = exact.sample(prompts, uniforms, Sampling(temperature, stop))
    found = on_gpu(case).sample(prompts, uniforms, Sampling(temperature, stop))
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        # A delta net's state gathers the rounding of 150 tokens.
        np.testing.assert_allclose(
            one.logprobs, other.logprobs, atol=1e-3 if case.kind == "qwen3_5" else 2e-4
        )
        assert one.finished == other.finished


@pytest.mark.parametrize("adapters", [False, True])
def test_samples_of_half_precision(case, adapters):
    """Recorded steps give what steps run one by one give, to the bit."""
    options = ModelOptions(
        case.folder, "bfloat16", adapters=AdapterOptions(rank=2, alpha=4.0) if adapters else None
    )
    loaded = opened(options, device="cuda:0")
    assert loaded.model.device.record_step is record_graph
    prompts, uniforms = (
        [group.student for group in case.groups[:4]],
        np.random.default_rng(5).random((4, 3, 90), dtype=np.float32),
    )
    found = loaded.backend().sample(prompts, uniforms, Sampling(1.0))
    wanted = loaded.backend(record_step=StepByStep).sample(prompts, uniforms, Sampling(1.0))
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_a_step(case, exact, tmp_path):
    """And what is written of it; the CPU reads it."""
    backends = [opd_torch.load_cuda(ModelOptions(case.folder)), case.backend("float32")]
    backends[0].load(case.state)
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
    device = this_device("cuda:0")
    assert (device.check_every, device.free_bytes) == (8, None)
