"""The MLX backend against stock mlx-vlm, row by row: values, gradients of every parameter, samples."""

from __future__ import annotations

import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from opd.errors import OutOfMemory
from opd.objective import Objective
from opd.types import Sampling
from opd_mlx import gradient as gradient_module
from opd_mlx import sampling
from opd_mlx.device import this_device
from opd_mlx.families import qwen3_vl as family_module
from opd_mlx.footprint import free_bytes, recompute_share
from opd_mlx.kernels import activations
from tests.support.mlx_cases import MAC, clone, distribution, loss_of, make_case, plain_loss_and_gradients, relative_error
from tests.support.random_models import qwen3_vl

JSD = Objective(alpha=0.5, top_k=20)
OBJECTIVES = [JSD, Objective(alpha=0.3, top_k=None, temperature=1.3), Objective(alpha=1.0, top_k=30, tail=False)]


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("mlx")
    return make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def loaded(case):
    return case.backend()


@pytest.fixture(scope="module")
def expected(case):
    return {objective: plain_loss_and_gradients(case, case.groups, objective) for objective in OBJECTIVES}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_loss_and_every_gradient(case, loaded, expected, objective):
    backend = clone(loaded)
    loss, gradients = expected[objective]
    assert loss_of(case.groups, backend.accumulate(case.groups, objective)) == pytest.approx(loss, rel=1e-5)
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-4
    assert min(np.abs(value).max() for value in gradients.values()) > 0, "a parameter without gradient proves nothing"


def test_untied_head_without_deepstack(tmp_path):
    case = make_case(tmp_path, qwen3_vl(tmp_path / "model", seed=1, tied=False, deepstack=0, layers=2, kv_heads=4))
    backend = case.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups, JSD)
    assert loss_of(case.groups, backend.accumulate(case.groups, JSD)) == pytest.approx(loss, rel=1e-5)
    assert "lm_head.weight" in gradients
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-4


def test_prompts_of_one_length(case, loaded):
    """Where nothing is padded there is no mask."""
    groups = [case.groups[0], case.groups[4]]
    assert len(groups[0].student) == len(groups[1].student)
    loss, gradients = plain_loss_and_gradients(case, groups, JSD)
    backend = clone(loaded)
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(loss, rel=1e-5)
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-4


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_layers_computed_again_in_the_backward(case, loaded, expected, monkeypatch, share):
    """All, or as many of the first as do not fit in a GPU's memory."""
    from opd_mlx import forward

    calls = []
    for module in (forward, family_module):
        real = module.checkpoint_if

        def checkpoint_if(recompute, *arguments, real=real, name=module):
            if recompute:
                calls.append(name)
            return real(recompute, *arguments)

        monkeypatch.setattr(module, "checkpoint_if", checkpoint_if)
    backend = clone(loaded, checkpoint_above=0)
    if share < 1:
        monkeypatch.setattr(gradient_module, "recompute_share", lambda *given: share)
    backend.accumulate(case.groups, JSD)
    times, config = Counter(calls), backend._model.config
    # Of prompts and of completions; and images of each size.
    layers, blocks = math.ceil(share * config["text_config"]["num_hidden_layers"]), math.ceil(share * config["vision_config"]["depth"])
    assert times[forward] == 2 * layers
    assert times[family_module] % blocks == 0 < times[family_module]
    assert relative_error(backend.tensors("gradient"), expected[JSD][1]) < 1e-4


def test_a_gpu_keeps_what_fits(loaded, monkeypatch):
    """Above the bound: all but the share whose activations fit; a CPU computes all layers again."""
    student, active = loaded._student, 10**11
    monkeypatch.setattr(mx, "get_active_memory", lambda: active)

    def shares(free, **traits):
        model = clone(loaded, memory=active + free * 3 // 2, **traits)._model
        return [recompute_share(model, wanted * 2**30, student, student) for wanted in (1, 2, 3, 6, 8)]

    assert shares(6 * 2**30) == [0, 0, 1, 1, 1]
    assert shares(6 * 2**30, gpu=True) == [0, 0, 0, 0, 0.25]
    assert shares(-(2**30), gpu=True) == [0, 0, 1, 1, 1]
    device = replace(this_device(), memory=10**12)
    trained = sum(value.nbytes for value in student.values())
    assert free_bytes(device, mx.float32, student, {}) == int(2 / 3 * (9 * 10**11 - trained))
    assert free_bytes(device, mx.float32, student, student) == 6 * 10**11
    assert free_bytes(device, mx.bfloat16, student, student) == int(2 / 3 * (9 * 10**11 - trained / 2))
    assert free_bytes(replace(device, memory=0), mx.float32, student, {}) < 0


def test_images_a_few_at_a_time(case, loaded, expected):
    backend = clone(loaded, pixel_bytes=1)
    backend.accumulate(case.groups, JSD)
    assert relative_error(backend.tensors("gradient"), expected[JSD][1]) < 1e-4


def test_what_a_gpu_runs(case, loaded, expected):
    """MLX's own attention where there is no gradient, and blocks of a GPU's sizes."""
    backend = clone(loaded, **MAC)
    backend.accumulate(case.groups, JSD)
    assert relative_error(backend.tensors("gradient"), expected[JSD][1]) < 1e-4


def test_another_thread(case, loaded, expected):
    """MLX's streams belong to a thread: what one thread loaded must compute in another."""
    backend = clone(loaded)
    with ThreadPoolExecutor(1) as threads:
        threads.submit(backend.accumulate, case.groups, JSD).result()
    assert relative_error(backend.tensors("gradient"), expected[JSD][1]) < 1e-4


def test_an_image_under_two_groups_is_computed_once(case, loaded, monkeypatch):
    patches = []
    family = loaded._model.family
    real = family.tower

    def tower(visual, pixels, *rest):
        patches.append(pixels.shape[0] * pixels.shape[1])
        return real(visual, pixels, *rest)

    monkeypatch.setattr(family, "tower", tower)
    clone(loaded).sample([group.student for group in case.groups], np.full((5, 1, 1), 0.5, np.float32), Sampling())
    distinct = {group.student.key: group.student for group in case.groups}
    assert len(distinct) == 4
    assert sum(patches) == sum(len(prompt.images["pixel_values"]) for prompt in distinct.values())


def phi(x):
    """The normal distribution's integral."""
    return 0.5 * (1 + np.vectorize(math.erf)(x / np.sqrt(2)))


def test_activations():
    """Value and gradient of the gated feed-forward and of both forms of GELU."""
    rng = np.random.default_rng(0)
    x, up, slope = rng.normal(0, 3, size=(3, 400))
    x[:4] = -40, 40, 0, -95
    let = 1 / (1 + np.exp(-x))
    given = [mx.array(part.astype(np.float32)) for part in (x, up, slope)]
    (value,), gradients = mx.vjp(activations.swiglu, given[:2], given[2:])
    np.testing.assert_allclose(value, x * let * up, rtol=2e-6, atol=1e-7)
    for gradient, wanted in zip(gradients, (slope * up * let * (1 + x * (1 - let)), slope * x * let), strict=True):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
    (value,), (gradient,) = mx.vjp(activations.exact_gelu, given[:1], given[2:])
    np.testing.assert_allclose(value, x * phi(x), rtol=1e-6, atol=5e-7)
    np.testing.assert_allclose(gradient, slope * (phi(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)), rtol=1e-6, atol=2e-6)
    (value,), (gradient,) = mx.vjp(activations.gelu, given[:1], given[2:])
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    rate = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    np.testing.assert_allclose(value, 0.5 * x * (1 + np.tanh(inner)), rtol=2e-6, atol=5e-7)
    wanted = 0.5 * (1 + np.tanh(inner)) + 0.5 * x * rate / np.cosh(np.minimum(np.abs(inner), 300)) ** 2
    np.testing.assert_allclose(gradient, slope * wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("cut", [[1, 1, 1, 1, 1], [2, 3], [4, 1]])
def test_cuts_into_calls_change_nothing(case, loaded, expected, cut):
    backend = clone(loaded)
    together = clone(loaded).accumulate(case.groups, JSD)
    apart, start = [], 0
    for size in cut:
        apart += backend.accumulate(case.groups[start : start + size], JSD)
        start += size
    assert relative_error(backend.tensors("gradient"), expected[JSD][1]) < 1e-4
    for ours, theirs in zip(apart, together, strict=True):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(one.divergence, other.divergence, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(one.teacher_logprobs, other.teacher_logprobs, atol=1e-5)


def test_a_call_that_fails(case, loaded, monkeypatch):
    """It leaves no gradient, and the step can be begun again."""
    backend = clone(loaded)
    backend.accumulate(case.groups, JSD)
    whole = backend.tensors("gradient")
    real, calls = gradient_module.divergence_head, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("[malloc] Unable to allocate 8 bytes.")
        return real(*arguments, **options)

    monkeypatch.setattr(gradient_module, "divergence_head", full)
    with pytest.raises(OutOfMemory, match=r"out of memory: \[malloc\] Unable"):
        backend.accumulate(case.groups, JSD, 1)
    assert not any(value.any() for value in backend.tensors("gradient").values())
    backend.accumulate(case.groups, JSD)
    for name, value in backend.tensors("gradient").items():
        np.testing.assert_array_equal(value, whole[name])


def test_score_is_the_stock_distribution(case, loaded):
    backend = clone(loaded)
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
                wanted = distribution(model, prompt, completion.tokens, 1.0, ())
                np.testing.assert_allclose(logprobs, wanted[range(len(completion)), completion.tokens], atol=1e-5)
                np.testing.assert_array_equal(top.tokens, np.argsort(-wanted, -1)[:, :3])
                np.testing.assert_allclose(top.logprobs, -np.sort(-wanted, -1)[:, :3], atol=1e-5)


@pytest.mark.parametrize(("temperature", "policy"), [(1.0, "student"), (0.7, "teacher"), (0.0, "student")])
def test_samples_are_the_stock_distributions(case, loaded, temperature, policy):
    """Likely tokens are banned, so that a ban that comes too late shows."""
    model = case.stock(policy)
    prompts = [group.student for group in case.groups[:4]]
    first = [int(distribution(model, prompt, np.zeros(1, np.int32), 1.0, ()).argmax()) for prompt in prompts]
    banned = sorted({*case.encoder.banned, *first[:2]})
    uniforms = np.random.default_rng(1).random((4, 3, 6), dtype=np.float32)
    uniforms[0, 0, :2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    sampled = clone(loaded).sample(prompts, uniforms, Sampling(temperature, (), tuple(banned)), policy)
    assert [len(row) for row in sampled] == [3] * 4
    for prompt, row, draws in zip(prompts, sampled, uniforms, strict=True):
        for completion, u in zip(row, draws, strict=True):
            logprobs = distribution(model, prompt, completion.tokens, temperature or 1.0, banned)
            expected = (np.cumsum(np.exp(logprobs), -1) > u[:, None]).argmax(-1) if temperature else logprobs.argmax(-1)
            np.testing.assert_array_equal(completion.tokens, expected)
            np.testing.assert_allclose(completion.logprobs, logprobs[range(6), completion.tokens], atol=1e-5)
            assert not completion.finished


def test_only_possible_tokens_are_drawn():
    """At both ends of the unit interval and beyond it, with the ends of the vocabulary banned or of probability 0."""
    banned = mx.array([-np.inf, 0, 0, 0, -np.inf])
    logits = np.array([[9.0, 0.0, 1.0, -200.0, 9.0]], np.float32).repeat(5, 0)
    uniforms = mx.array(np.array([0.0, 0.26, 0.27, np.nextafter(np.float32(1), np.float32(0)), 1.1], np.float32))
    tokens, logprobs = sampling.draw(mx.array(logits), mx.eye(5), uniforms, 1.0, banned)
    assert tokens.tolist() == [1, 1, 2, 2, 2]
    np.testing.assert_allclose(logprobs, np.log([0.26894142, 0.26894142, 0.73105858, 0.73105858, 0.73105858]), rtol=1e-5)


def test_a_completion_ends_with_its_first_stop_token(case, loaded):
    prompts = [group.student for group in case.groups[:3]]
    uniforms = np.random.default_rng(2).random((3, 2, 8), dtype=np.float32)
    free = clone(loaded).sample(prompts, uniforms, Sampling(1.0))
    stop = int(free[0][0].tokens[3])
    stopped = clone(loaded).sample(prompts, uniforms, Sampling(1.0, (stop,)))
    for before, after in zip(chain(*free), chain(*stopped), strict=True):
        places = np.flatnonzero(before.tokens == stop)
        assert after.finished == bool(len(places))
        np.testing.assert_array_equal(after.tokens, before.tokens[: places[0] + 1] if len(places) else before.tokens)
        np.testing.assert_array_equal(after.logprobs, before.logprobs[: len(after)])


def test_decoding_stops_when_all_have_ended(case, loaded, monkeypatch):
    steps = []
    real = sampling.decode
    monkeypatch.setattr(sampling, "decode", lambda *arguments: steps.append(1) or real(*arguments))
    prompts = [group.student for group in case.groups[:2]]
    anything = tuple(range(300))
    clone(loaded).sample(prompts, np.full((2, 2, 9), 0.5, np.float32), Sampling(1.0, anything))
    assert len(steps) == 1


def test_text_without_images(case, loaded):
    prompt = case.encoder.encode([], "What digit?")
    sampled = clone(loaded).sample([prompt], np.full((1, 1, 3), 0.5, np.float32), Sampling(1.0))[0][0]
    logprobs = distribution(case.stock(), prompt, sampled.tokens, 1.0, ())
    np.testing.assert_allclose(sampled.logprobs, logprobs[range(3), sampled.tokens], atol=1e-5)


@pytest.mark.parametrize("room", [2**30, 0])
def test_frozen_vision_tower(case, monkeypatch, room):
    """The same numbers; and every image goes through the tower once for rollout, student and teacher, while there is room."""
    encoded = []
    backend, whole = case.backend(tune_vision=False), case.backend()
    known = backend._model.feature_cache
    known.capacity = room
    real = known._compute
    monkeypatch.setattr(known, "_compute", lambda prompts: encoded.extend(one.key for one in prompts) or real(prompts))
    whole._teacher = dict(whole._student)
    assert not any(".visual." in name for name in backend.tensors("student"))
    for group in case.groups[:3]:
        uniforms = np.random.default_rng(4).random((1, 2, 4), dtype=np.float32)
        for ours, theirs in zip(*(one.sample([group.student], uniforms, Sampling(1.0))[0] for one in (backend, whole)), strict=True):
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    loss, expected = (loss_of(case.groups, one.accumulate(case.groups, JSD)) for one in (backend, whole))
    assert loss == pytest.approx(expected, rel=1e-6)
    text = {name: value for name, value in whole.tensors("gradient").items() if ".visual." not in name}
    assert relative_error(backend.tensors("gradient"), text) < 1e-5
    assert len(set(encoded)) == 4
    assert (len(encoded) == 4) == bool(room)


def test_bfloat16_computes_on_float32_masters(case):
    """Half precision is near the exact gradient as a whole, and it is accumulated in float32."""
    groups = case.groups[:3]
    exact, backend = case.backend(), case.backend("bfloat16")
    exact_loss = loss_of(groups, exact.accumulate(groups, JSD))
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(exact_loss, rel=0.05)
    ours, theirs = (np.concatenate([value.ravel() for value in one.tensors("gradient").values()]) for one in (backend, exact))
    assert 1e-4 < np.linalg.norm(ours - theirs) / np.linalg.norm(theirs) < 0.1
    assert {value.dtype for one in (backend._gradient, backend._student) for value in one.values()} == {mx.float32}
    sampled, wanted = (
        one.sample([groups[0].student], np.full((1, 2, 4), 0.4, np.float32), Sampling(1.0))[0][0] for one in (backend, exact)
    )
    np.testing.assert_allclose(sampled.logprobs[:1], wanted.logprobs[:1], atol=0.1)


def test_modules_keep_nothing_between_calls(case, loaded):
    """Neither traced arrays nor a cast copy of the model outlive a call."""
    backend = clone(loaded)
    backend.accumulate(case.groups, JSD)
    left = sum(value.size for name, value in backend_module_parameters(backend))
    assert left == len(backend._student)


def backend_module_parameters(backend):
    from mlx.utils import tree_flatten

    return tree_flatten(backend._model.module.parameters())


def test_other_errors_of_mlx_are_not_a_full_memory(case, loaded, monkeypatch):
    def wrong(*arguments, **options):
        raise RuntimeError("[matmul] shapes do not fit")

    monkeypatch.setattr(gradient_module, "divergence_head", wrong)
    with pytest.raises(RuntimeError, match="matmul") as caught:
        clone(loaded).accumulate(case.groups, JSD)
    assert not isinstance(caught.value, OutOfMemory)
