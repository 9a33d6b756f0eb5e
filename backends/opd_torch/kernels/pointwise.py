"""Norms and GELU for float32 on a CPU, where torch runs every operation of transformers' modules by itself: fewer passes over memory, and
backwards of their own, which keep one array where autograd keeps three.

Legend: N rows, D their width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

INNER, CUBE = math.sqrt(8 / math.pi), 0.044715
"""GELU is x sigmoid(INNER (x + CUBE x^3)), which is the form with a tanh by another name; an exponential takes a third of a tanh's time."""


def quicken(model: nn.Module) -> None:
    """Puts `RMSNorm` and `GELU` in the place of transformers' own modules, with their parameters; all else stays."""
    gelu = type(ACT2FN["gelu_pytorch_tanh"])
    for name, module in list(model.named_modules()):
        # Only norms that multiply by their weight have this attribute, but some of them have a gate too.
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            model.set_submodule(name, RMSNorm(module.weight, module.variance_epsilon))
        elif isinstance(module, gelu):
            model.set_submodule(name, GELU())


class RMSNorm(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis."""

    def __init__(self, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.weight = weight
        self.epsilon = torch.tensor(epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Of rows [..., D]."""
        if not torch.is_grad_enabled():
            return _normed(x, self.epsilon)[0].mul_(self.weight)
        out: Tensor = _Norm.apply(x, self.weight, self.epsilon)
        return out


class GELU(nn.Module):  # type: ignore[misc]  # torch is untyped here
    """GELU in its approximation by a tanh."""

    def forward(self, x: Tensor) -> Tensor:
        """Of any shape."""
        if not torch.is_grad_enabled():
            return _let_through(x * x, x).mul_(x)
        out: Tensor = _Gelu.apply(x)
        return out


def _normed(x: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of mean square 1, and what they were multiplied by."""
    scale = torch.add(epsilon, (x * x).sum(-1, keepdim=True), alpha=1 / x.shape[-1]).rsqrt_()
    return x * scale, scale


class _Norm(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: Tensor) -> Tensor:
        normed, scale = _normed(x, epsilon)
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        normed, scale, weight = ctx.saved_tensors
        along = gradient * normed
        mean = (along @ weight).div_(len(weight))[..., None]
        of_weight = along.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return (gradient * weight).addcmul_(normed, mean, value=-1.0).mul_(scale), of_weight, None


def _let_through(square: Tensor, x: Tensor) -> Tensor:
    """The sigmoid in GELU, from x^2 and x."""
    return (square * (INNER * CUBE)).add_(INNER).mul_(x).sigmoid_()


class _Gelu(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """Keeps the derivative, so that the backward is one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x * x
        let = _let_through(square, x)
        # With s the sigmoid of u(x): d/dx x s = s + s (1 - s) x u', and x u' = INNER x (1 + 3 CUBE x^2).
        inner = square.mul_(3 * INNER * CUBE).add_(INNER).mul_(x)
        ctx.save_for_backward(torch.ops.aten.sigmoid_backward(inner, let).add_(let))
        return let.mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        out: Tensor = gradient * ctx.saved_tensors[0]
        return out
