"""What only the torch backend has to show of its families: recomputed layers, images on a GPU.

The numbers that both backends owe stand in tests/backends/test_families.py.
"""

from __future__ import annotations

import json
from dataclasses import replace
from math import ceil
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.numpy import load_file, save_file

import opd_torch
from opd.objective import Objective
from opd.types import ModelOptions
from opd_torch import footprint, vision
from opd_torch.batch import lay_out
from opd_torch.device import this_device
from opd_torch.layers import gated_delta
from tests.support import random_models
from tests.support.cases import watch
from tests.support.torch_cases import (
    delta_rule_in_float64,
    loss_of,
    make_case,
    opened,
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
    return case.loaded()


@pytest.fixture(scope="module")
def expected(case, double):
    """The gradient as test_families.py holds it to stock transformers."""
    backend = double.backend()
    backend.accumulate(case.groups, JSD)
    return backend.tensors("gradient")


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_layers_computed_again_in_the_backward(case, double, expected, monkeypatch, share):
    """All, or as many of the first as do not fit in a GPU's memory."""
    names = []
    named = lambda function, *_, **__: names.append(getattr(function, "__name__", "block"))
    watch(monkeypatch, "opd_torch.layers.layer.checkpoint", named)
    used = [group for group in case.groups if group.tokens]
    completions = [[one.tokens for one in group.completions] for group in used]
    batch = lay_out([group.student for group in used], completions, torch.device("cpu"))
    wanted = footprint.activation_bytes(double.model, batch)
    free = int((1 - share) * wanted)
    share = 1 - free / wanted
    backend = double.backend(checkpoint_above=0, free_bytes=free)
    backend.accumulate(case.groups, JSD)
    config = double.model.module.config
    text, tower = config.text_config, config.vision_config
    layers, blocks = text.num_hidden_layers, getattr(tower, "depth", 0) or tower.num_hidden_layers
    language = ceil(share * layers)
    assert names.count("prefix") == names.count("completion") == language
    images = len(names) - 2 * language
    assert images % ceil(share * blocks) == 0 < images
    assert relative_error(backend.tensors("gradient"), expected) < 1e-6


def test_a_gpu_keeps_what_fits(tmp_path):
    """Above the bound: all but the share that fits; a CPU recomputes all layers."""
    loaded = opened(ModelOptions(random_models.qwen3_vl(tmp_path)))

    def shares(*wanted, **settings):
        model = loaded.on(**settings)
        return [footprint.recompute_share(model, size * 2**30) for size in wanted]

    assert shares(1, 2, 3) == [0, 0, 1]
    assert shares(2, 6, 8, free_bytes=6 * 2**30) == [0, 0, 0.25]
    assert shares(8, free_bytes=-1) == [1]


def test_images_stay_on_a_gpu(case, double, expected):
    """Between the passes of a step; what is computed of them is the same."""
    backend = double.backend(uploaded_bytes=2**29)
    for _ in range(2):
        backend.accumulate(case.groups, JSD)
    twice = {name: 2 * value for name, value in expected.items()}
    assert relative_error(backend.tensors("gradient"), twice) < 1e-6


@pytest.mark.parametrize(
    ("room", "uploads"),
    [(300, "ABC"), (200, "ABCB"), (100, "ABACABA"), (1, "ABACABA")],
)
def test_the_oldest_images_leave_a_gpu_first(room, uploads):
    """Images of 100 bytes each are asked for one by one, A as often as the others together."""
    device = replace(this_device("cpu"), uploaded_bytes=room)
    uploaded, prompts = [], {}
    for key in "ABC":
        visual = SimpleNamespace(index=np.arange(1))
        prompts[key] = SimpleNamespace(key=f"{room} {uploads} {key}", visual=visual)

    def images(prompt):
        uploaded.append(prompt.key[-1])
        return [((1, 1), np.full(25, ord(prompt.key[-1]), np.float32))]

    for key in "ABACABA":
        tower = lambda stacked, size: [stacked[:, None]]
        (found,) = vision.visual_features([prompts[key]], images, tower, device)
        np.testing.assert_array_equal(found, np.full((1, 25), ord(key)))
    assert "".join(uploaded) == uploads


def test_smolvlm2(tmp_path):
    """The same modules under another name; its processor needs torchvision, so the prompts are
    SmolVLM's."""
    case = make_case(tmp_path, random_models.smolvlm(tmp_path / "model"))
    config = json.loads((case.folder / "config.json").read_text())
    config["vision_config"]["model_type"] = "smolvlm_vision"
    (case.folder / "config.json").write_text(json.dumps(config | {"model_type": "smolvlm"}))
    loaded, groups = case.loaded(), case.groups[:2]
    backend = loaded.backend()
    assert type(loaded.model.module).__name__ == "SmolVLMForConditionalGeneration"
    loss, gradients = plain_loss_and_gradients(case, groups, JSD)
    assert loss_of(groups, backend.accumulate(groups, JSD)) == pytest.approx(loss, rel=1e-6)
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-6


def test_delta_net_as_it_stands(tmp_path):
    """Against transformers' own float32 delta net, within what float32 allows."""
    case = make_case(tmp_path, random_models.qwen3_5(tmp_path / "model"))
    backend = case.backend()
    loss, gradients = plain_loss_and_gradients(case, case.groups[:2], JSD)
    assert loss_of(case.groups[:2], backend.accumulate(case.groups[:2], JSD)) == pytest.approx(
        loss, rel=1e-5
    )
    assert relative_error(backend.tensors("gradient"), gradients) < 1e-4


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
