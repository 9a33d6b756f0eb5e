"""What only the MLX backend has to show: other settings of a device, threads, and its activations.

The numbers that both backends owe stand in tests/backends/test_exact.py.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")

from mlx.utils import tree_flatten

from opd.errors import OutOfMemory
from opd.groups import drop_empty
from opd.objective import Objective
from opd.types import ModelOptions, Sampling
from opd_mlx.batch import lay_out
from opd_mlx.device import this_device
from opd_mlx.footprint import activation_bytes, free_bytes, recompute_share
from opd_mlx.kernels import activations
from tests.support.cases import watch
from tests.support.mlx_cases import (
    MAC,
    load,
    loss_of,
    make_case,
    plain_loss_and_gradients,
    relative_error,
)
from tests.support.random_models import qwen3_vl

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("mlx")
    return make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def loaded(case):
    return case.loaded()


@pytest.fixture(scope="module")
def expected(case):
    return plain_loss_and_gradients(case, case.groups, JSD)[1]


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_layers_computed_again_in_the_backward(case, loaded, expected, monkeypatch, share):
    """All, or as many of the first as do not fit in a GPU's memory."""
    calls = []
    for name in ("forward", "families.qwen3_vl"):
        seen = lambda recompute, *_, name=name: calls.append((name, bool(recompute)))
        watch(monkeypatch, f"opd_mlx.{name}.checkpoint_if", seen)
    used = drop_empty(case.groups)
    completions = [[one.tokens for one in group.completions] for group in used]
    batch = lay_out([group.student for group in used], completions)
    wanted = activation_bytes(loaded.model, batch)
    free = int((1 - share) * wanted)
    share = 1 - free / wanted
    backend = loaded.backend(checkpoint_above=0, free_bytes=free)
    backend.accumulate(case.groups, JSD)
    times, config = Counter(calls), loaded.model.config
    layers = math.ceil(share * config["text_config"]["num_hidden_layers"])
    blocks = math.ceil(share * config["vision_config"]["depth"])
    # Of prompts and of completions; and images of each size.
    assert times["forward", True] == 2 * layers
    images = times["families.qwen3_vl", True]
    assert images % blocks == 0 < images
    assert relative_error(backend.tensors("gradient"), expected) < 1e-4


def test_a_gpu_keeps_what_fits(loaded):
    """Above the bound: all but the share whose activations fit; a CPU computes all layers again."""
    student, gpu = loaded.student, {"free_bytes": None}
    gc.collect()  # else arrays of earlier tests may be freed meanwhile
    mx.synchronize()

    def shares(free, **traits):
        model = loaded.on(memory=mx.get_active_memory() + free * 3 // 2, **traits)
        return [
            recompute_share(model, wanted * 2**30, student, student) for wanted in (1, 2, 3, 6, 8)
        ]

    assert shares(6 * 2**30) == [0, 0, 1, 1, 1]
    assert shares(6 * 2**30, **gpu) == [0, 0, 0, 0, 0.25]
    assert shares(-(2**30), **gpu) == [0, 0, 1, 1, 1]
    device = replace(this_device(), memory=mx.get_active_memory() + 9 * 10**11)
    trained = sum(value.nbytes for value in student.values())
    assert free_bytes(device, mx.float32, student, {}) == int(2 / 3 * (9 * 10**11 - trained))
    assert free_bytes(device, mx.float32, student, student) == 6 * 10**11
    assert free_bytes(device, mx.bfloat16, student, student) == int(
        2 / 3 * (9 * 10**11 - trained / 2)
    )
    assert free_bytes(replace(device, memory=0), mx.float32, student, {}) < 0


def test_images_a_few_at_a_time(case, loaded, expected):
    backend = loaded.backend(pixel_bytes=1)
    backend.accumulate(case.groups, JSD)
    assert relative_error(backend.tensors("gradient"), expected) < 1e-4


def test_what_a_gpu_runs(case, loaded, expected):
    """MLX's own attention where there is no gradient, and blocks of a GPU's sizes."""
    backend = loaded.backend(**MAC)
    backend.accumulate(case.groups, JSD)
    assert relative_error(backend.tensors("gradient"), expected) < 1e-4


def test_another_thread(case, loaded, expected):
    """MLX's streams belong to a thread: what one thread loaded must compute in another."""
    backend = loaded.backend()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(backend.accumulate, case.groups, JSD).result()
    assert relative_error(backend.tensors("gradient"), expected) < 1e-4


@pytest.fixture
def patches(monkeypatch):
    """Patches that the vision tower takes, call by call."""
    taken = []
    seen = lambda _, __, pixels, *___: taken.append(pixels.shape[0] * pixels.shape[1])
    watch(monkeypatch, "opd_mlx.families.qwen3_vl.Qwen3VL.tower", seen)
    return taken


def patches_of(prompts):
    """Patches of the prompts' images, each image once."""
    distinct = {prompt.key: prompt for prompt in prompts}
    assert len(distinct) == 4
    return sum(len(prompt.images["pixel_values"]) for prompt in distinct.values())


def test_an_image_under_two_groups_is_computed_once(case, loaded, patches):
    prompts = [group.student for group in case.groups]
    loaded.backend().sample(prompts, np.full((5, 1, 1), 0.5, np.float32), Sampling())
    assert sum(patches) == patches_of(prompts)


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
    for gradient, wanted in zip(
        gradients, (slope * up * let * (1 + x * (1 - let)), slope * x * let), strict=True
    ):
        np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-6)
    (value,), (gradient,) = mx.vjp(activations.exact_gelu, given[:1], given[2:])
    np.testing.assert_allclose(value, x * phi(x), rtol=1e-6, atol=5e-7)
    np.testing.assert_allclose(
        gradient,
        slope * (phi(x) + x * np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)),
        rtol=1e-6,
        atol=2e-6,
    )
    (value,), (gradient,) = mx.vjp(activations.gelu, given[:1], given[2:])
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    rate = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    np.testing.assert_allclose(value, 0.5 * x * (1 + np.tanh(inner)), rtol=2e-6, atol=5e-7)
    wanted = (
        0.5 * (1 + np.tanh(inner)) + 0.5 * x * rate / np.cosh(np.minimum(np.abs(inner), 300)) ** 2
    )
    np.testing.assert_allclose(gradient, slope * wanted, rtol=1e-5, atol=2e-6)


def test_decoding_stops_when_all_have_ended(case, loaded, monkeypatch):
    steps = []
    watch(monkeypatch, "opd_mlx.sampling.decode", lambda *_: steps.append(1))
    prompts = [group.student for group in case.groups[:2]]
    anything = Sampling(1.0, tuple(range(300)))
    loaded.backend().sample(prompts, np.full((2, 2, 9), 0.5, np.float32), anything)
    assert len(steps) == 1


@pytest.mark.parametrize("room", [2**30, 0])
def test_frozen_vision_tower(case, patches, monkeypatch, room):
    """The same numbers; and every image runs once for rollout, student and teacher.

    While there is room for its features: else the tower runs again.
    """
    frozen = load(ModelOptions(case.folder, tune_vision=False), feature_bytes=room)
    whole = case.backend()
    whole.move_teacher(1.0)
    assert not any(".visual." in name for name in frozen.tensors("student"))
    keys: list[str] = []
    seen = lambda prompts, *_: keys.extend(prompt.key for prompt in prompts)
    watch(monkeypatch, "opd_mlx.families.qwen3_vl.visual_features", seen)
    encoded = {}
    uniforms, taken = np.random.default_rng(4).random((1, 2, 4), dtype=np.float32), {}
    found = []
    for backend in (frozen, whole):
        patches.clear()
        sampled = [
            one
            for group in case.groups[:3]
            for one in backend.sample([group.student], uniforms, Sampling(1.0))[0]
        ]
        loss = loss_of(case.groups, backend.accumulate(case.groups, JSD))
        found.append((sampled, loss))
        taken[backend] = sum(patches)
        encoded[backend], keys[:] = list(keys), []
    for ours, theirs in zip(*(sampled for sampled, _ in found), strict=True):
        np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)
    gradient = whole.tensors("gradient")
    text = {name: value for name, value in gradient.items() if ".visual." not in name}
    assert relative_error(frozen.tensors("gradient"), text) < 1e-5
    once = patches_of([group.student for group in case.groups])
    assert taken[frozen] >= once
    assert (taken[frozen] == once) == bool(room)
    assert len(set(encoded[frozen])) == 4
    assert (len(encoded[frozen]) == 4) == bool(room)


def test_modules_keep_nothing_between_calls(case, loaded):
    """Neither traced arrays nor a cast copy of the model outlive a call."""
    backend = loaded.backend()
    backend.accumulate(case.groups, JSD)
    left = tree_flatten(loaded.model.module.parameters())
    assert sum(value.size for _, value in left) == len(loaded.student)


def test_other_errors_of_mlx_are_not_a_full_memory(case, loaded, monkeypatch):
    def wrong(*_, **__):
        raise RuntimeError("[matmul] shapes do not fit")

    watch(monkeypatch, "opd_mlx.gradient.divergence_head", wrong)
    with pytest.raises(RuntimeError, match="matmul") as caught:
        loaded.backend().accumulate(case.groups, JSD)
    assert not isinstance(caught.value, OutOfMemory)
