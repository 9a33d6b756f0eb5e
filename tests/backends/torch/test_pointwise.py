"""Norms and GELU with backwards of their own against transformers' modules in float64: values and
gradients; and where they stand."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")

from transformers.activations import ACT2FN
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLRMSNorm
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5RMSNorm, Qwen3_5RMSNormGated
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRMSNorm

from opd.types import ModelOptions
from opd_torch.device import this_device
from opd_torch.kernels.pointwise import GELU, RMSNorm, replace_modules
from opd_torch.model import load_model
from tests.support.random_models import qwen3_vl

CPU = torch.device("cpu")
WIDTH = 24
EPSILON = 1e-3


def found(module, x, gradient):
    """Value, and gradients to `x` and to every parameter."""
    x = x.clone().requires_grad_()
    value = module(x)
    return [value.detach(), *torch.autograd.grad(value, (x, *module.parameters()), gradient)]


@pytest.mark.parametrize("norm", [Qwen3VLTextRMSNorm, Qwen2_5_VLRMSNorm, LlamaRMSNorm])
@pytest.mark.parametrize("shape", [(7, WIDTH), (5, 3, WIDTH)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_norm(norm, shape, size):
    """Rows far below epsilon, of its size, and far above it."""
    torch.manual_seed(0)
    exact = torch.nn.Sequential(norm(WIDTH, EPSILON))
    torch.nn.init.normal_(exact[0].weight)
    quick = copy.deepcopy(exact)
    replace_modules(quick, this_device("cpu"), torch.float32)
    assert isinstance(quick[0], RMSNorm)
    x, gradient = size * torch.randn(shape), torch.randn(shape)
    # transformers' norm rounds to float32 even here.
    ours = found(quick, x, gradient)
    for mine, theirs in zip(
        ours, found(exact.double(), x.double(), gradient.double()), strict=True
    ):
        torch.testing.assert_close(
            mine.double(), theirs, rtol=1e-5, atol=2e-6 * theirs.abs().max().item()
        )
    with torch.no_grad():
        assert torch.equal(quick(x), ours[0])


def test_a_frozen_norm_lets_the_gradient_through():
    module = RMSNorm(torch.nn.Parameter(torch.rand(WIDTH), requires_grad=False), EPSILON)
    x = torch.randn(5, WIDTH, requires_grad=True)
    module(x).sum().backward()
    assert x.grad.abs().max() > 0
    assert module.weight.grad is None


def test_gelu():
    """Also where nothing or everything goes through; the slope is the one thing that is kept."""
    x = torch.cat(
        [torch.linspace(-12, 12, 2001), torch.tensor([0.0, 1e-30, -1e-30, 60.0, -60.0, 1e4, -1e4])]
    ).view(-1, 8)
    gradient = torch.linspace(0.5, 1.5, x.numel()).view_as(x)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        ours = found(GELU(), x, gradient)
    assert [tensor.numel() for tensor in kept] == [x.numel()]
    for mine, theirs in zip(
        ours, found(ACT2FN["gelu_pytorch_tanh"], x.double(), gradient.double()), strict=True
    ):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=2e-6)
    with torch.no_grad():
        assert torch.equal(GELU()(x), ours[0])


def test_others_stay():
    """Norms by one more than their weight, or with a gate, and the exact GELU."""
    modules = [
        Gemma3RMSNorm(8),
        Qwen3_5RMSNorm(8),
        Qwen3_5RMSNormGated(8),
        ACT2FN["gelu"],
        torch.nn.LayerNorm(8),
    ]
    model = torch.nn.ModuleList(modules)
    replace_modules(model, this_device("cpu"), torch.float32)
    assert list(model) == modules


def test_a_model_in_float32_has_them(tmp_path):
    """By the same names; in other precisions it is transformers' own."""
    path = qwen3_vl(tmp_path / "model")
    models = {
        dtype: load_model(ModelOptions(path, dtype), this_device("cpu", dtype)).module
        for dtype in ("float32", "bfloat16", "float64")
    }
    kinds = {dtype: {type(module) for module in model.modules()} for dtype, model in models.items()}
    assert kinds["float32"] >= {RMSNorm, GELU}
    assert Qwen3VLTextRMSNorm not in kinds["float32"]
    names = {
        dtype: [name for name, _ in model.named_parameters()] for dtype, model in models.items()
    }
    for dtype in ("bfloat16", "float64"):
        assert not kinds[dtype] & {RMSNorm, GELU}
        assert names[dtype] == names["float32"]
