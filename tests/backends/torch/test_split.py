"""Completions that run a few at a time: the same statistics and gradient, less memory, for every family."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opd.errors import OutOfMemory
from opd.objective import Objective
from opd.types import STATISTICS, Completion, Group
from opd_torch import gradient
from tests.backends.torch.test_memory import peak_bytes
from tests.support import random_models
from tests.support.torch_cases import clone, gradients_of, make_case, on_device, relative_error

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def case(request, tmp_path_factory):
    """Groups of 3, 1, 2, 0 and 3 completions, one of them empty."""
    root = tmp_path_factory.mktemp(request.param)
    case = make_case(root, random_models.FAMILIES[request.param](root / "model"))
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    first = case.groups[0]
    completions, weights = (first.completions[0], empty, first.completions[2]), (first.weights[0], empty.logprobs, first.weights[2])
    return replace(case, groups=[replace(first, completions=completions, weights=weights), *case.groups[1:]])


@pytest.fixture(autouse=True, scope="module")
def float64_throughout():
    """transformers' norms compute in float32 in a float64 model too, which would be all that the splits differ in."""
    real = torch.Tensor.float, torch.Tensor.to
    narrowed = (torch.float32,)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else real[0](x))
        patch.setattr(
            torch.Tensor, "to", lambda x, *to, **more: x if (x.dtype, to) == (torch.float64, narrowed) else real[1](x, *to, **more)
        )
        yield


@pytest.fixture(scope="module")
def double(case):
    return case.backend()


@pytest.fixture(scope="module")
def whole(case, double):
    backend = clone(double)
    return backend.accumulate(case.groups, JSD), gradients_of(backend)


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_split_is_whole(case, double, whole, split, again):
    backend = on_device(clone(double), checkpoint_above=0 if again else 2**60)
    statistics = backend.accumulate(case.groups, JSD, split)
    assert relative_error(gradients_of(backend), whole[1]) < 1e-9
    for ours, theirs, group in zip(statistics, whole[0], case.groups, strict=True):
        assert [len(one.ratio) for one in ours] == [len(completion) for completion in group.completions]
        for one, other in zip(ours, theirs, strict=True):
            for name in STATISTICS:
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)


def test_a_prompt_runs_once(case, double, monkeypatch):
    """Forward and backward, of both policies, whatever the split."""
    backend, rows = clone(double), []
    layer = backend._student.layers[0].module
    layer.input_layernorm.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    layer.input_layernorm.register_full_backward_hook(lambda _, __, outputs: rows.append(-len(outputs[0])))
    groups = case.groups[2:3]
    backend.accumulate(groups, JSD, 1)
    prompt = len(groups[0].student) - 1
    assert rows == [prompt, 4, -4, 6, -6, -prompt]


def test_a_call_that_fails(case, double, whole, monkeypatch):
    """A part that fails leaves neither a gradient nor the beginning of one, and the step can be begun again."""
    backend = clone(double)
    backend.accumulate(case.groups, JSD, 1)
    kernel, calls = gradient.divergence_head, []

    def fails(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return kernel(*arguments, **options)

    monkeypatch.setattr(gradient, "divergence_head", fails)
    with pytest.raises(OutOfMemory, match="out of memory: no "):
        backend.accumulate(case.groups, JSD, 1)
    assert not backend._gradient
    assert all(parameter.grad is None for parameter in backend._student.parameters.values())
    backend.accumulate(case.groups, JSD, 2)
    assert relative_error(gradients_of(backend), whole[1]) < 1e-9
    backend.accumulate(case.groups, JSD, 1)
    assert relative_error(gradients_of(backend), {name: 2 * value for name, value in whole[1].items()}) < 1e-9


SIZES = {"hidden": 128, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 32, "mlp": 512}


def test_memory(tmp_path, monkeypatch):
    """It falls with the split, and at one completion at a time further completions cost their hidden states alone."""
    case = make_case(tmp_path, random_models.qwen3_vl(tmp_path / "model", **SIZES))
    backend, length = case.backend("float32"), 96
    rng = np.random.default_rng(0)

    def peak(n: int, split: int) -> int:
        tokens = [rng.integers(0, 200, length).astype(np.int32) for _ in range(n)]
        completions = tuple(Completion(one, np.full(length, -5, np.float32), False) for one in tokens)
        weights = tuple(np.full(length, 0.01, np.float32) for _ in tokens)
        group = Group(case.groups[0].student, case.groups[0].teacher, completions, weights)
        return peak_bytes(lambda: backend.accumulate([group], JSD, split))

    whole, two, one = (peak(8, split) for split in (0, 2, 1))
    assert two < 0.6 * whole
    assert one < 0.8 * two
    hidden = 4 * SIZES["hidden"] * length
    assert peak(16, 1) - one < 1.5 * 8 * hidden
