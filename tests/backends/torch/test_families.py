"""What only the torch backend has to show of its families: recomputed layers, images on a GPU.

The numbers that both backends owe stand in tests/backends/test_families.py.
"""

from __future__ import annotations

import json
from math import ceil

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file

import opd_torch
from opd.objective import Objective
from opd.types import ModelOptions
from opd_torch import footprint, vision
from opd_torch.layers import gated_delta
from tests.support import random_models
from tests.support.cases import watch
from tests.support.torch_cases import (
    clone,
    delta_rule_in_float64,
    gradients_of,
    load,
    loss_of,
    make_case,
    model_of,
    on_device,
    plain_delta_rule,
    plain_loss_and_gradients,
    relative_error,
)

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    with delta_rule_in_float64():
        yield make_case(root, random_models.FAMILIES[request.param](root / "model"))


@pytest.fixture(scope="module")
def double(case):
    return case.backend()


@pytest.fixture(scope="module")
def expected(case, double):
    """The gradient as test_families.py holds it to stock transformers."""
    backend = clone(double)
    backend.accumulate(case.groups, JSD)
    return gradients_of(backend)


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_layers_computed_again_in_the_backward(case, double, expected, monkeypatch, share):
    """All, or as many of the first as do not fit in a GPU's memory."""
    names = []
    named = lambda function, *_, **__: names.append(getattr(function, "__name__", "block"))
    watch(monkeypatch, "opd_torch.layers.layer.checkpoint", named)
    if share < 1:
        monkeypatch.setattr("opd_torch.gradient.recompute_share", lambda model, wanted: share)
    backend = clone(double, checkpoint_above=0)
    backend.accumulate(case.groups, JSD)
    config = model_of(double).module.config
    text, tower = config.text_config, config.vision_config
    layers, blocks = text.num_hidden_layers, getattr(tower, "depth", 0) or tower.num_hidden_layers
    language = ceil(share * layers)
    assert names.count("prefix") == names.count("completion") == language
    images = len(names) - 2 * language
    assert images % ceil(share * blocks) == 0 < images
    assert relative_error(gradients_of(backend), expected) < 1e-6


def test_a_gpu_keeps_what_fits(tmp_path, monkeypatch):
    """Above the bound: all but the share that fits; a CPU recomputes all layers."""
    backend = load(ModelOptions(random_models.qwen3_vl(tmp_path)))

    def shares(*wanted):
        model = model_of(backend)
        return [footprint.recompute_share(model, size * 2**30) for size in wanted]

    monkeypatch.setattr(footprint, "free_bytes", lambda model: 6 * 2**30)
    assert shares(1, 2, 3) == [0, 0, 1]
    on_device(backend, torch=torch.device("cuda"))
    assert shares(2, 6, 8) == [0, 0, 0.25]
    monkeypatch.setattr(footprint, "free_bytes", lambda model: -1)
    assert shares(8) == [1]


def test_images_stay_on_a_gpu(case, double, expected, monkeypatch):
    """Between the passes of a step, in a store whose oldest entries go first; what is computed of
    them is the same."""
    known, uploads = {}, []
    monkeypatch.setattr(vision, "_uploaded", known)
    real = vision._on_device
    monkeypatch.setattr(
        vision,
        "_on_device",
        lambda prompt, images, device: real(
            prompt, lambda one: uploads.append(1) or images(one), device
        ),
    )
    backend = clone(double, uploaded_bytes=2**29)
    backend.accumulate(case.groups, JSD)
    assert relative_error(gradients_of(backend), expected) < 1e-6
    keys = {
        prompt.key
        for group in case.groups
        if group.tokens
        for prompt in (group.student, group.teacher)
    }
    assert len(uploads) == len(known) == len(keys)
    clone(double, uploaded_bytes=1).accumulate(case.groups[:1], JSD)
    assert list(known) == [(case.groups[0].student.key, torch.device("cpu"))]


def test_smolvlm2(tmp_path):
    """The same modules under another name; its processor needs torchvision, so the prompts are
    SmolVLM's."""
    case = make_case(tmp_path, random_models.smolvlm(tmp_path / "model"))
    config = json.loads((case.folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "smolvlm_vision"
    (case.folder / "config.json").write_text(json.dumps(config | {"model_type": "smolvlm"}))
    backend, groups = case.backend(), case.groups[:2]
    assert type(model_of(backend).module).__name__ == "SmolVLMForConditionalGeneration"
    loss, gradients = plain_loss_and_gradients(case, groups, JSD)
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(gradients_of(backend), gradients) < 1e-6


def test_delta_net_as_it_stands(tmp_path):
    """Against transformers' own float32 delta net, within what float32 allows."""
    case = make_case(tmp_path, random_models.qwen3_5(tmp_path / "model"))
    backend = case.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups[:2], JSD)
    assert loss_of(case.groups[:2], backend.accumulate(case.groups[:2], JSD)) == pytest.approx(
        loss, rel=1e-5
    )
    assert relative_error(gradients_of(backend), gradients) < 1e-4


def test_heads_that_are_left_out_are_kept(tmp_path):
    """Published Qwen3.5 files also hold heads for further tokens, which are neither loaded nor
    lost."""
    folder = random_models.qwen3_5(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"mtp.fc.weight": np.arange(6, dtype=np.float32)},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    opd_torch.load_cpu(ModelOptions(folder)).export(tmp_path / "out", "model")
    exported = load_file(tmp_path / "out" / "model.safetensors")
    assert exported.keys() == weights.keys() | {"mtp.fc.weight"}
    np.testing.assert_array_equal(exported["mtp.fc.weight"], np.arange(6))


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_delta_rule_is_the_recurrence(chunk):
    """Value and every gradient, for rows longer and shorter than a chunk, from a state that is not
    zero."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = [
        normal(2, 10, 2, 5),
        normal(2, 10, 2, 5),
        normal(2, 10, 4, 3),
        -normal(2, 10, 4).exp(),
        normal(2, 10, 4).sigmoid(),
    ]
    inputs = [x.requires_grad_() for x in (*inputs, normal(2, 4, 5, 3))]
    weights = normal(2, 10, 4, 3), normal(2, 4, 5, 3)
    ours, theirs = gated_delta.gated_delta_rule(*inputs, chunk=chunk), plain_delta_rule(*inputs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    found, wanted = (
        torch.autograd.grad(
            sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), inputs
        )
        for outputs in (ours, theirs)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
