"""Norms and activations with fewer passes over memory than transformers' modules.

For float32 on a CPU: RMSNorm and GELU with a hand-written backward, which keeps one array where
autograd keeps three. For half precision on a GPU: `opd_torch.kernels.fused`.

Legend: N rows, D their width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from opd_torch.device import Device
from opd_torch.kernels import fused
from opd_torch.kernels.function import Context, Function
from opd_torch.layers.modules import FeedForward

INNER, CUBE = math.sqrt(8 / math.pi), 0.044715
"""GELU's tanh form equals x sigmoid(INNER (x + CUBE x^3)), and an exponential takes a third of the
time of a tanh.
"""


def replace_modules(model: nn.Module, device: Device, dtype: torch.dtype) -> None:
    """Replaces transformers' norms and activations by modules of this file, with the same
    parameters.

    It does so for float32 on a CPU and for half precision on a GPU (`Device.fused`); otherwise all
    modules stay.
    """
    on_cpu = device.torch.type == "cpu" and dtype == torch.float32
    gelu = type(ACT2FN["gelu_pytorch_tanh"])
    for name, module in list(model.named_modules()):
        # Norms that multiply by the weight call epsilon `variance_epsilon`; norms that multiply by
        # 1 + weight call it `eps`. Gated norms have another ending than RMSNorm, and stay.
        norm = type(module).__name__.endswith("RMSNorm")
        multiplies = hasattr(module, "variance_epsilon")
        if norm and device.fused:
            epsilon = module.variance_epsilon if multiplies else module.eps
            model.set_submodule(name, HalfNorm(module.weight, epsilon, 1.0 - multiplies))
        elif norm and on_cpu and multiplies:
            model.set_submodule(name, RMSNorm(module.weight, module.variance_epsilon))
        elif on_cpu and isinstance(module, gelu):
            model.set_submodule(name, GELU())


def feed_forward(mlp: FeedForward, rows: Tensor) -> Tensor:
    """A layer's feed-forward on rows [N, D]. On a GPU in half precision, a gate with SiLU is one
    kernel.
    """
    silu = isinstance(getattr(mlp, "act_fn", None), (nn.SiLU, type(ACT2FN["silu"])))
    if silu and fused.usable(rows):
        return mlp.down_proj(fused.swiglu(mlp.gate_proj(rows), mlp.up_proj(rows)))
    return mlp(rows)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = torch.tensor(epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises rows [..., D]."""
        if not torch.is_grad_enabled():
            return _normed(x, self.epsilon)[0].mul_(self.weight)
        out: Tensor = _Norm.apply(x, self.weight, self.epsilon)
        return out


class HalfNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * (weight + more) over the last axis, computed in float32 and
    rounded once. `more` is 0, or 1 in families whose norms multiply by 1 + weight.
    """

    def __init__(self, weight: nn.Parameter, epsilon: float, more: float) -> None:
        super().__init__()
        self.weight, self.epsilon, self.more = weight, epsilon, more

    @property
    def scale(self) -> Tensor:
        """The factor [D] of normalised rows, weight + more, in float32."""
        wide = self.weight.float()
        return wide + self.more if self.more else wide

    def forward(self, x: Tensor) -> Tensor:
        """Normalises rows [..., D]."""
        if fused.usable(x):
            return fused.rms_norm(x, self.scale, self.epsilon, torch.bfloat16)
        wide = x.float()
        return (
            wide * (wide.square().mean(-1, keepdim=True) + self.epsilon).rsqrt() * self.scale
        ).to(x.dtype)


class GELU(nn.Module):
    """GELU in the approximation with a tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """Activates `x` of any shape."""
        if not torch.is_grad_enabled():
            return _sigmoid(x * x, x).mul_(x)
        out: Tensor = _Gelu.apply(x)
        return out


def _normed(x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Scales rows [..., D] to mean square 1; returns them and the factor [..., 1]."""
    scale = torch.add(epsilon, (x * x).sum(-1, keepdim=True), alpha=1 / x.shape[-1]).rsqrt_()
    return x * scale, scale


class _Norm(Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
        normed, scale = _normed(x, epsilon)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        along = gradient * normed
        mean = (along @ weight).div_(len(weight))[..., None]
        weight_gradient = along.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        inner = (gradient * weight).addcmul_(normed, mean, value=-1.0)
        return inner.mul_(scale), weight_gradient, None


def _sigmoid(square: Tensor, x: Tensor) -> Tensor:
    """The sigmoid in GELU, from x^2 and x."""
    return (square * (INNER * CUBE)).add_(INNER).mul_(x).sigmoid_()


class _Gelu(Function):
    """GELU that stores the derivative in the forward, so that the backward is one product."""

    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        square = x * x
        sigmoid = _sigmoid(square, x)
        # With s = sigmoid(u): d/dx (x s) = s + s (1 - s) x u', and
        # x u' = INNER x (1 + 3 CUBE x^2).
        inner = square.mul_(3 * INNER * CUBE).add_(INNER).mul_(x)
        ctx.save_for_backward(torch.ops.aten.sigmoid_backward(inner, sigmoid).add_(sigmoid))
        return sigmoid.mul_(x)

    @staticmethod
    def backward(ctx: Context, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0]
