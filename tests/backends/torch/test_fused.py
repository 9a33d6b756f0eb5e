"""Triton's kernels against plain formulas in float64: on a GPU, or else by Triton's interpreter, in
a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from torch.utils.checkpoint import checkpoint

from opd.objective import Objective
from opd.types import ModelOptions
from opd_torch.kernels import fused
from opd_torch.kernels.pointwise import HalfNorm
from opd_torch.kernels.rotary import rotary_factors
from tests.support import random_models
from tests.support.torch_cases import loss_of, make_case, opened

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16
ROUNDED = 0.006
"""Relative error of what is rounded to bfloat16, or cut to it, as the interpreter does."""

kernels = pytest.mark.skipif(not fused.HERE, reason="runs where there is a GPU or the interpreter")


@pytest.mark.slow
@pytest.mark.skipif(fused.HERE, reason="is there to start the others")
def test_by_the_interpreter():
    """Triton decides at its import how kernels run, so the others have a process of their own."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[3]
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def numbers(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def leaf(x: torch.Tensor, wide: bool = False) -> torch.Tensor:
    return (x.detach().double() if wide else x.detach()).requires_grad_()


def near(ours: torch.Tensor, theirs: torch.Tensor, most: float) -> None:
    assert ours.shape == theirs.shape
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert float((ours - theirs).norm()) <= most * float(theirs.norm()) + 1e-12


def normed(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def turned(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """As `rotate` lays it out; in float64."""
    width = 2 * angles.shape[-1]
    first, second = x[..., :width].chunk(2, -1)
    real, imaginary = angles.real.double(), angles.imag.double()
    pairs = torch.stack(
        [first * real - second * imaginary, first * imaginary + second * real], -1
    ).flatten(-2)
    return torch.cat([pairs, x[..., width:]], -1)


def angles_of(seed: int, *shape: int) -> torch.Tensor:
    places = numbers(seed, *shape).repeat(*(1,) * (len(shape) - 1), 2)
    return rotary_factors(places.cos(), places.sin())


@pytest.fixture
def few(monkeypatch):
    """Programs that take several tiles each."""
    monkeypatch.setattr(fused, "PROGRAMS", 4)
    monkeypatch.setattr(fused, "NUMBERS", 64)


@kernels
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("shape", [(40, 40), (3, 5, 96), (2, 1500), (0, 32)])
@pytest.mark.parametrize(
    ("before", "after"), [(torch.float32, torch.float32), (torch.float32, HALF), (HALF, HALF)]
)
def test_norm(shape, before, after):
    x, weight, gradient = (
        numbers(0, *shape, dtype=before),
        1 + 0.1 * numbers(1, shape[-1]),
        numbers(2, *shape, dtype=after),
    )
    ours, factor = leaf(x), leaf(weight)
    found = fused.rms_norm(ours, factor, 1e-6, after)
    found.backward(gradient)
    theirs, its = leaf(x, True), leaf(weight, True)
    wanted = normed(theirs, its)
    wanted.backward(gradient.double())
    near(found, wanted, ROUNDED if after == HALF else 1e-6)
    near(ours.grad, theirs.grad, ROUNDED if before == HALF else 1e-6)
    near(factor.grad, its.grad, 1e-5)
    assert (found.dtype, ours.grad.dtype, factor.grad.dtype) == (after, before, torch.float32)


@kernels
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("before", [torch.float32, HALF])
@pytest.mark.parametrize(
    ("count", "heads", "width", "turn"),
    [(13, 3, 16, 16), (5, 5, 20, 12), (11, 1, 80, 80), (33, 2, 8, 4), (0, 2, 8, 8)],
)
def test_heads_normed_and_turned(count, heads, width, turn, before, norm):
    """Heads that stand apart, as those of a projection that makes a gate too; of any width, turned
    in part."""
    x = numbers(0, count, heads, 2 * width, dtype=before)[..., :width]
    weight, angles = 1 + 0.1 * numbers(1, width), angles_of(2, count, 1, turn // 2)
    gradient = numbers(3, heads, count, width, dtype=HALF).transpose(0, 1)
    ours, factor = leaf(x), leaf(weight)
    found = fused.normed_rotated(ours, factor if norm else None, 1e-6, angles)
    found.backward(gradient)
    theirs, its = leaf(x, True), leaf(weight, True)
    wanted = turned(normed(theirs, its) if norm else theirs, angles)
    wanted.backward(gradient.double())
    near(found, wanted, ROUNDED)
    near(ours.grad, theirs.grad, ROUNDED if before == HALF else 1e-5)
    if norm:
        near(factor.grad, its.grad, 1e-5)
    assert (found.dtype, ours.grad.dtype) == (HALF, before)


@kernels
@pytest.mark.usefixtures("few")
def test_packed_heads():
    """Of two images; gradients come in another order of axes than heads have."""
    packed, angles = numbers(0, 2, 7, 3, 5, 12, dtype=HALF), angles_of(1, 7, 1, 1, 6)
    gradients = [numbers(seed, 2, 5, 7, 12, dtype=HALF).transpose(1, 2) for seed in (2, 3, 4)]
    ours, theirs = leaf(packed), leaf(packed, True)
    found = fused.rotated_heads(ours, angles)
    query, key = turned(theirs[:, :, :2], angles).unbind(2)
    wanted = (query, key, theirs[:, :, 2])
    torch.autograd.backward(found, gradients)
    torch.autograd.backward(wanted, [gradient.double() for gradient in gradients])
    for one, other in zip(found, wanted, strict=True):
        near(one, other, ROUNDED)
    near(ours.grad, theirs.grad, ROUNDED)


@kernels
@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("shape", [(13, 70), (1, 5), (0, 8)])
def test_gate(shape):
    gate, up, gradient = (numbers(seed, *shape, dtype=HALF) for seed in (0, 1, 2))
    ours, theirs = [leaf(x) for x in (gate, up)], [leaf(x, True) for x in (gate, up)]
    found, wanted = fused.swiglu(*ours), torch.nn.functional.silu(theirs[0]) * theirs[1]
    found.backward(gradient)
    wanted.backward(gradient.double())
    near(found, wanted, ROUNDED)
    for one, other in zip(ours, theirs, strict=True):
        near(one.grad, other.grad, ROUNDED)


@kernels
def test_frozen_weights_and_computing_again():
    """As under adapters, and in a layer that is computed again; in inference nothing is kept."""
    x, weight, angles = leaf(numbers(0, 9, 2, 8)), 1 + 0.1 * numbers(1, 8), angles_of(2, 9, 1, 4)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return fused.normed_rotated(fused.rms_norm(x, weight, 1e-6, HALF), weight, 1e-6, angles)

    plain, gradient = layer(x), numbers(3, 9, 2, 8, dtype=HALF)
    wanted = torch.autograd.grad(plain, x, gradient)[0]
    torch.testing.assert_close(
        torch.autograd.grad(checkpoint(layer, x, use_reentrant=False), x, gradient)[0],
        wanted,
        rtol=0,
        atol=0,
    )
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), plain.detach(), rtol=0, atol=0)


TWO_LAYERS = {
    "qwen2_5_vl": {"num_hidden_layers": 2},
    "qwen3_5": {
        "num_hidden_layers": 2,
        "layer_types": [random_models.LINEAR, "full_attention"],
    },
    "gemma3": {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "smolvlm": {"num_hidden_layers": 2},
}
"""One layer of each kind, since the interpreter takes long."""


@kernels
@pytest.mark.parametrize("kind", random_models.FAMILIES)
def test_whole_models(kind, tmp_path, monkeypatch):
    """With all kernels in their places a bfloat16 model is as near to float64 as without; the norms
    that multiply by 1 + weight too."""
    folder = tmp_path / "model"
    if kind == "qwen3_vl":
        random_models.qwen3_vl(folder, layers=2)
    else:
        random_models.FAMILIES[kind](folder, more={"text": TWO_LAYERS[kind]})
    case = make_case(tmp_path, folder)
    # The teacher has other weights, and the interpreter takes long: one image of two windows is
    # enough, and none for SmolVLM, whose tower and projector have no such kernel.
    pixels = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    images = [] if kind == "smolvlm" else [Image.fromarray(pixels)]
    prompt = case.encoder.encode(images, "What?")
    groups = [replace(case.groups[2], student=prompt, teacher=prompt)]
    objective = Objective(alpha=0.5, top_k=None)
    exact = case.backend()
    loss, errors = loss_of(groups, exact.accumulate(groups, objective)), []
    calls = []
    for served in (False, True):
        if served:
            monkeypatch.setattr(
                fused,
                "usable",
                lambda x: torch.is_autocast_enabled(DEVICE) and not calls.append(x.dtype),
            )
        elif DEVICE == "cuda":
            monkeypatch.setattr(fused, "usable", lambda x: False)
        settings = {"fused": served or DEVICE == "cuda"}
        options = ModelOptions(case.folder, "bfloat16")
        loaded = opened(options, case.state, device=DEVICE, **settings)
        backend = loaded.backend(loaded.model)
        assert loss_of(groups, backend.accumulate(groups, objective)) == pytest.approx(
            loss, rel=0.2
        )
        gradients = [one.tensors("gradient") for one in (backend, exact)]
        ours, theirs = (
            np.concatenate([one[name].ravel() for name in gradients[0]]) for one in gradients
        )
        errors.append(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))
        names = {
            name
            for name, module in loaded.model.module.named_modules()
            if isinstance(module, HalfNorm)
        }
    assert calls
    assert names
    assert errors[1] < 1.5 * errors[0] + 0.01
    assert set(gradients[0]) == set(gradients[1])
