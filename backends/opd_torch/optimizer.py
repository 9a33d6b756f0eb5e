"""AdamW on float32 parameters, clipping by the global norm, and the teacher's moving average.

Source: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as torch.optim.AdamW
computes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from opd.types import Update, UpdateResult


class Optimizer:
    """AdamW with bias correction over the trained parameters: two moments for each parameter, by
    name, and the number of steps taken.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.step = 0
        self.first = {
            name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()
        }
        self.second = {
            name: torch.zeros_like(parameter) for name, parameter in self.parameters.items()
        }

    @property
    def moments(self) -> dict[str, Tensor]:
        """Both moments of every parameter, by the names in state files."""
        first = {f"first.{name}": value for name, value in self.first.items()}
        return first | {f"second.{name}": value for name, value in self.second.items()}

    def apply(self, gradient: Mapping[str, Tensor], update: Update) -> UpdateResult:
        """Takes one step on `gradient`, which is overwritten. If the gradient's norm is not finite,
        nothing changes.
        """
        norm = global_norm(gradient.values())
        if not math.isfinite(norm):
            return UpdateResult(gradient_norm=norm, taken=False)
        factor = (
            1.0
            if update.gradient_clip is None or norm <= update.gradient_clip
            else update.gradient_clip / norm
        )
        self.step += 1
        gradients = [gradient[name].mul_(factor) for name in self.parameters]
        with torch.no_grad():
            # One pass over each tensor, without a copy:
            # theta <- (1 - lr * decay) * theta
            #          - lr * (first / (1 - beta1^t)) / (sqrt(second / (1 - beta2^t)) + epsilon).
            torch._fused_adamw_(
                list(self.parameters.values()),
                gradients,
                list(self.first.values()),
                list(self.second.values()),
                [],
                [torch.tensor(float(self.step), device=gradients[0].device)] * len(gradients),
                lr=update.learning_rate,
                beta1=update.betas[0],
                beta2=update.betas[1],
                weight_decay=update.weight_decay,
                eps=update.epsilon,
                amsgrad=False,
                maximize=False,
            )
        return UpdateResult(gradient_norm=norm, taken=True)


def global_norm(tensors: Iterable[Tensor]) -> float:
    """The Euclidean norm of all tensors together."""
    norms = torch.stack([torch.linalg.vector_norm(tensor) for tensor in tensors])
    return float(torch.linalg.vector_norm(norms))


def move_teacher(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], rate: float) -> None:
    """Computes teacher += rate * (student - teacher) in float32 and in place.

    Rate 1 copies the student to the bit, rate 0 changes nothing.
    """
    with torch.no_grad():
        for name, parameter in teacher.items():
            parameter.lerp_(student[name], rate)
