"""The torch backend against stock transformers, row by row, in float64 and float32: values, gradients of every parameter, samples."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from opd.objective import Objective
from opd.types import Sampling
from tests.support.random_models import qwen3_vl
from tests.support.torch_cases import (
    clone,
    gradients_of,
    loss_of,
    make_case,
    on_device,
    plain_loss_and_gradients,
    relative_error,
    stock_logits,
)

JSD = Objective(alpha=0.5, top_k=20)
OBJECTIVES = [JSD, Objective(alpha=0.3, top_k=None, temperature=1.3), Objective(alpha=1.0, top_k=30, tail=False)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("torch")
    return make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def double(case):
    return case.backend()


@pytest.fixture(scope="module")
def expected(case):
    return {objective: plain_loss_and_gradients(case, case.groups, objective) for objective in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_float64(case, double, expected, objective):
    backend = clone(double)
    loss, gradients = expected[objective]
    assert loss_of(case.groups, backend.accumulate(case.groups, objective)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_of(backend), gradients) < 1e-6
    assert min(np.abs(value).max() for value in gradients.values()) > 0, "a parameter without gradient proves nothing"


def test_float32(case, expected):
    backend = case.backend("float32")
    loss, gradients = expected[JSD]
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-5)
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-4


def test_untied_head_without_deepstack(tmp_path):
    case = make_case(tmp_path, qwen3_vl(tmp_path / "model", seed=1, tied=False, deepstack=0, layers=2, kv_heads=4))
    backend = case.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups, JSD)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert "lm_head.weight" in gradients
    assert relative_error(gradients_of(backend), gradients) < 1e-6


def test_prompts_of_one_length(case, double):
    """Where nothing is padded other code runs: no mask, no gathering, equal counts."""
    groups = [case.groups[0], case.groups[4]]
    assert len(groups[0].student) == len(groups[1].student)
    loss, gradients = plain_loss_and_gradients(case, groups, JSD)
    backend = clone(double)
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_of(backend), gradients) < 1e-6


def test_layers_computed_again_in_the_backward(case, double, expected, monkeypatch):
    from opd_torch.layers import layer

    calls = []
    real = layer.checkpoint
    monkeypatch.setattr(layer, "checkpoint", lambda *arguments, **options: calls.append(1) or real(*arguments, **options))
    backend = on_device(clone(double), checkpoint_above=0)
    backend.accumulate(case.groups, JSD)
    assert calls
    assert relative_error(gradients_of(backend), expected[JSD][1]) < 1e-6


@pytest.mark.parametrize("cut", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_cuts_into_calls_change_nothing(case, double, expected, cut):
    backend = clone(double)
    together = clone(double).accumulate(case.groups, JSD)
    apart, start = [], 0
    for size in cut:
        apart += backend.accumulate(case.groups[start : start + size], JSD)
        start += size
    assert relative_error(gradients_of(backend), expected[JSD][1]) < 1e-6
    for ours, theirs in zip(apart, together, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.divergence, other.divergence, rtol=1e-5)
            np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, rtol=1e-5)


def test_score_is_the_stock_distribution(case, double):
    backend = clone(double)
    student, teacher = case.stock(), case.stock("teacher")
    scored = backend.score(case.groups, JSD, top=3)
    assert not backend._gradient
    for group, row in zip(case.groups, scored, strict=True):
        assert len(row) == len(group.completions)
        for completion, one in zip(group.completions, row, strict=True):
            for model, prompt, logprobs, top in (
                (student, group.student, one.student_logprobs, one.student_top),
                (teacher, group.teacher, one.teacher_logprobs, one.teacher_top),
            ):
                with torch.no_grad():
                    wanted = stock_logits(model, prompt, completion.tokens).log_softmax(-1).numpy()
                np.testing.assert_allclose(logprobs, wanted[range(len(completion)), completion.tokens], rtol=1e-6)
                np.testing.assert_array_equal(top.tokens, np.argsort(-wanted, -1)[:, :3])
                np.testing.assert_allclose(top.logprobs, -np.sort(-wanted, -1)[:, :3], rtol=1e-6)


def distribution(model, prompt, tokens, temperature, banned):
    """Probabilities [T, V] a sampler draws from, by stock transformers and numpy."""
    with torch.no_grad():
        logits = stock_logits(model, prompt, tokens).numpy() / temperature
    logits[:, banned] = -np.inf
    probabilities = np.exp(logits - logits.max(-1, keepdims=True))
    return probabilities / probabilities.sum(-1, keepdims=True)


@pytest.mark.parametrize(("temperature", "policy"), [(1.0, "student"), (0.7, "teacher"), (0.0, "student")])
def test_samples_are_the_stock_distributions(case, double, temperature, policy):
    """Likely tokens are banned, so that a ban that comes too late shows."""
    backend, model = clone(double), case.stock(policy)
    prompts = [group.student for group in case.groups[:4]]
    with torch.no_grad():
        first = [int(stock_logits(model, prompt, np.zeros(1, np.int32)).argmax()) for prompt in prompts]
    banned = sorted({*case.encoder.banned, *first[:2]})
    uniforms = np.random.default_rng(1).random((4, 3, 6), dtype=np.float32)
    uniforms[0, 0, :2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    sampled = backend.sample(prompts, uniforms, Sampling(temperature, (), tuple(banned)), policy)
    assert [len(row) for row in sampled] == [3] * 4
    for prompt, row, draws in zip(prompts, sampled, uniforms, strict=True):
        for completion, u in zip(row, draws, strict=True):
            probabilities = distribution(model, prompt, completion.tokens, temperature or 1.0, banned)
            expected = (np.cumsum(probabilities, -1) > u[:, None]).argmax(-1) if temperature else probabilities.argmax(-1)
            np.testing.assert_array_equal(completion.tokens, expected)
            np.testing.assert_allclose(completion.logprobs, np.log(probabilities[range(6), completion.tokens]), rtol=1e-6)
            assert not completion.finished


def test_a_completion_ends_with_its_first_stop_token(case, double):
    prompts = [group.student for group in case.groups[:3]]
    uniforms = np.random.default_rng(2).random((3, 2, 8), dtype=np.float32)
    free = clone(double).sample(prompts, uniforms, Sampling(1.0))
    stop = int(free[0][0].tokens[3])
    stopped = clone(double).sample(prompts, uniforms, Sampling(1.0, (stop,)))
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        places = np.flatnonzero(before.tokens == stop)
        assert after.finished == bool(len(places))
        np.testing.assert_array_equal(after.tokens, before.tokens[: places[0] + 1] if len(places) else before.tokens)
        np.testing.assert_array_equal(after.logprobs, before.logprobs[: len(after)])


def test_a_long_completion_outgrows_the_buffers(case, double, monkeypatch):
    from opd_torch.layers import attention

    prompts = [case.groups[1].student]
    uniforms = np.random.default_rng(3).random((1, 2, 12), dtype=np.float32)
    wide = clone(double).sample(prompts, uniforms, Sampling(1.0))
    monkeypatch.setattr(attention, "FIRST_BUFFER", 3)
    for one, other in zip(wide[0], clone(double).sample(prompts, uniforms, Sampling(1.0))[0], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_text_without_images(case, double):
    """Alone, and beside a prompt with an image."""
    prompt = case.encoder.encode([], "What digit?")
    sampled = clone(double).sample([prompt], np.full((1, 1, 3), 0.5, np.float32), Sampling(1.0))[0][0]
    mixed = clone(double).sample([case.groups[0].student, prompt], np.full((2, 1, 3), 0.5, np.float32), Sampling(1.0))[1][0]
    np.testing.assert_array_equal(mixed.tokens, sampled.tokens)
    np.testing.assert_allclose(mixed.logprobs, sampled.logprobs, rtol=1e-6)
    model = case.stock()
    ids = torch.tensor(np.concatenate([prompt.tokens, sampled.tokens]).astype(np.int64))[None]
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    np.testing.assert_allclose(sampled.logprobs, logprobs[range(3), sampled.tokens], rtol=1e-6)


def test_an_image_is_seen_once_in_a_call(case, double, monkeypatch):
    """Prompts of equal key share their features; images of one size run together."""
    from opd_torch.families import qwen3_vl

    seen = []
    real = qwen3_vl._tower
    monkeypatch.setattr(
        qwen3_vl, "_tower", lambda visual, patches, size, again: seen.append(patches.shape[:2]) or real(visual, patches, size, again)
    )
    prompts = [group.student for group in case.groups]
    assert prompts[0].key == prompts[4].key
    clone(double).sample(prompts, np.full((5, 1, 1), 0.5, np.float32), Sampling())
    # Of SIZES, without the last: 64 x 64 in patches of 8 four times, and three others.
    assert sorted((count, patches) for count, patches in seen) == [(1, 36), (1, 60), (1, 96), (4, 64)]


def test_frozen_vision_tower(case, tmp_path, monkeypatch):
    """The same gradient but for the tower's parameters, which are neither trained nor copied for the teacher; images are seen once."""
    from opd_torch.families import qwen3_vl as module

    seen = []
    real = module._tower
    monkeypatch.setattr(module, "_tower", lambda visual, patches, *rest: seen.append(len(patches)) or real(visual, patches, *rest))
    backend = case.backend("float64", tune_vision=False)
    assert not any(".visual." in name for name in backend.tensors("student"))
    for ours, theirs in zip(
        backend._student.module.model.visual.parameters(), backend._teacher.module.model.visual.parameters(), strict=True
    ):
        assert ours is theirs
    backend.save(tmp_path / "trained")
    shutil.copytree(case.state, tmp_path / "whole")
    moved = {name: value for name, value in load_file(case.state / "teacher.safetensors").items() if ".visual." not in name}
    save_file(moved, tmp_path / "trained" / "teacher.safetensors")
    save_file(load_file(case.state / "student.safetensors") | moved, tmp_path / "whole" / "teacher.safetensors")
    backend.load(tmp_path / "trained")
    loss, gradients = plain_loss_and_gradients(replace(case, state=tmp_path / "whole"), case.groups, JSD)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-6)
    wanted = {name: value for name, value in gradients.items() if ".visual." not in name}
    assert relative_error(gradients_of(backend), wanted) < 1e-6
    assert sum(seen) == 7
    backend.accumulate(case.groups[2:4], JSD)
    backend.accumulate([case.groups[index] for index in (4, 1, 0)], JSD)
    assert relative_error(gradients_of(backend), {name: 2 * value for name, value in wanted.items()}) < 1e-6
    backend.sample([group.student for group in case.groups], np.full((5, 1, 1), 0.5, np.float32), Sampling())
    assert sum(seen) == 7
    backend._student.feature_cache.capacity = 0
    backend.score(case.groups[:1], JSD)
    backend.score(case.groups[2:4], JSD)
    assert sum(seen) > 7


def test_bfloat16_computes_on_float32_masters(case):
    """Half precision is near the exact gradient as a whole, and it is accumulated in float32."""
    groups = case.groups[:3]
    exact = case.backend("float32")
    exact_loss = loss_of(groups, exact.accumulate(groups, JSD))
    backend = case.backend("bfloat16")
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(exact_loss, rel=0.05)
    ours, theirs = (np.concatenate([value.ravel() for value in one.tensors("gradient").values()]) for one in (backend, exact))
    assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1
    assert {value.dtype for value in backend._gradient.values()} == {torch.float32}
    assert {value.dtype for value in backend._student.parameters.values()} == {torch.float32}
    sampled = backend.sample([groups[0].student], np.full((1, 2, 4), 0.5, np.float32), Sampling(1.0))[0][0]
    scored = exact.sample([groups[0].student], np.full((1, 2, 4), 0.5, np.float32), Sampling(1.0))[0][0]
    np.testing.assert_allclose(sampled.logprobs[:1], scored.logprobs[:1], atol=0.1)
