"""What only the torch backend has to show of Qwen3-VL: buffers that grow, and images seen once.

The numbers that both backends owe stand in tests/backends/test_exact.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")

from opd.objective import Objective
from opd.types import ModelOptions, Sampling
from opd_torch.model import copy_model
from tests.support.random_models import qwen3_vl
from tests.support.torch_cases import (
    loss_of,
    make_case,
    opened,
    plain_loss_and_gradients,
    relative_error,
)

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    root = tmp_path_factory.mktemp("torch")
    return make_case(root, qwen3_vl(root / "model"))


@pytest.fixture(scope="module")
def double(case):
    return case.loaded()


def seen_by(model):
    """Images and patches of each that the vision towers of the model and of its copies take, call
    by call."""
    shapes = []
    take = lambda _, inputs, __: shapes.append(tuple(inputs[0].shape[:2]))
    model.module.model.visual.blocks[0].norm1.register_forward_hook(take)
    return shapes


def test_a_long_completion_outgrows_the_buffers(case, double):
    prompts = [case.groups[1].student]
    uniforms = np.random.default_rng(3).random((1, 2, 12), dtype=np.float32)
    wide = double.backend().sample(prompts, uniforms, Sampling(1.0))
    narrow = double.backend(cache_tokens=3).sample(prompts, uniforms, Sampling(1.0))
    for one, other in zip(wide[0], narrow[0], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.logprobs, other.logprobs)


def test_an_image_is_seen_once_in_a_call(case, double):
    """Prompts of equal key share their features; images of one size run together."""
    prompts = [group.student for group in case.groups]
    assert prompts[0].key == prompts[4].key
    model = double.on()
    seen = seen_by(model)
    double.backend(model).sample(prompts, np.full((5, 1, 1), 0.5, np.float32), Sampling())
    # Of SIZES, without the last: 64 x 64 in patches of 8 four times, and three others.
    assert sorted(seen) == [(1, 36), (1, 60), (1, 96), (4, 64)]


def test_frozen_vision_tower(case, tmp_path):
    """The gradient is the same but for the tower, which the policies share; images are seen once.

    While there is room for their features: else the tower runs again.
    """
    options = ModelOptions(case.folder, "float64", tune_vision=False)
    loaded = opened(options)
    model = loaded.on()
    seen = seen_by(model)
    backend = loaded.backend(model)
    assert not any(".visual." in name for name in backend.tensors("student"))
    for folder in ("trained", "whole"):
        shutil.copytree(case.state, tmp_path / folder)
    backend.save(tmp_path / "trained")
    teacher = load_file(case.state / "teacher.safetensors")
    moved = {name: value for name, value in teacher.items() if ".visual." not in name}
    save_file(moved, tmp_path / "trained" / "teacher.safetensors")
    student = load_file(case.state / "student.safetensors")
    save_file(student | moved, tmp_path / "whole" / "teacher.safetensors")
    backend.load(tmp_path / "trained")
    whole = replace(case, state=tmp_path / "whole")
    loss, gradients = plain_loss_and_gradients(whole, case.groups, JSD)
    found = loss_of(case.groups, backend.accumulate(case.groups, JSD))
    assert found == pytest.approx(loss, rel=1e-6)
    wanted = {name: value for name, value in gradients.items() if ".visual." not in name}
    assert relative_error(backend.tensors("gradient"), wanted) < 1e-6
    images = lambda: sum(count for count, _ in seen)
    assert images() == 7
    backend.accumulate(case.groups[2:4], JSD)
    backend.accumulate([case.groups[index] for index in (4, 1, 0)], JSD)
    double = {name: 2 * value for name, value in wanted.items()}
    assert relative_error(backend.tensors("gradient"), double) < 1e-6
    prompts = [group.student for group in case.groups]
    backend.sample(prompts, np.full((5, 1, 1), 0.5, np.float32), Sampling())
    assert images() == 7
    model = opened(options, feature_bytes=0).model
    seen = seen_by(model)
    without = loaded.backend(model)
    counts = [images()]
    for _ in range(2):
        without.score(case.groups, JSD)
        counts.append(images())
    assert counts[2] - counts[1] == counts[1] - counts[0] >= 7


def test_the_policies_share_a_frozen_tower(case):
    student = opened(ModelOptions(case.folder, tune_vision=False)).model
    tower = lambda model: model.module.model.visual.parameters()
    pairs = zip(tower(student), tower(copy_model(student)), strict=True)
    assert all(one is other for one, other in pairs)
