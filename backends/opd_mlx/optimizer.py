"""AdamW with bias correction over float32 masters, clipping by the global norm, and the teacher's moving average.

Source: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from opd.types import Update, UpdateResult
from opd_mlx.model import Parameters


class Optimizer:
    """AdamW with bias correction over the trained parameters, by name; its state is two moments a parameter and a step count."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.step = 0
        self.first, self.second = zeros(parameters), zeros(parameters)

    def apply(self, gradient: Parameters, update: Update) -> UpdateResult:
        """One step on `gradient`, which changes the parameters' dictionary in place; where its norm is not finite nothing changes."""
        norm = global_norm(gradient)
        if not np.isfinite(norm):
            return UpdateResult(norm, taken=False)
        scale = 1.0 if update.gradient_clip is None or norm == 0 else min(1.0, update.gradient_clip / norm)
        step = self.step + 1
        (b1, b2), rate = update.betas, update.learning_rate
        # Numbers worked out in double precision, so that float32 sees each of them rounded once.
        correction, root = rate / (1 - b1**step), float(np.sqrt(1 - b2**step))
        for name, value in self.parameters.items():
            g = gradient[name] if scale == 1.0 else scale * gradient[name]
            first = self.first[name] = b1 * self.first[name] + (1 - b1) * g
            second = self.second[name] = b2 * self.second[name] + (1 - b2) * mx.square(g)
            moved = correction * first / (mx.sqrt(second) / root + update.epsilon)
            kept = value if update.weight_decay == 0 else (1 - rate * update.weight_decay) * value
            self.parameters[name] = kept - moved
        mx.eval(self.parameters, self.first, self.second)
        self.step = step
        return UpdateResult(norm, taken=True)


def global_norm(gradient: Parameters) -> float:
    """Euclidean norm over all tensors. Rows are summed one by one: MLX's sum over a whole array loses digits on the CPU."""
    squares = [mx.square(value).reshape(-1, value.shape[-1]).sum(-1) for value in gradient.values()]
    return float(np.sqrt(np.array(mx.concatenate(squares), np.float64).sum()))


def move_teacher(teacher: Parameters, student: Parameters, rate: float) -> None:
    """theta_T += rate * (theta_S - theta_T), in float32 and in place; rate 1 copies to the bit."""
    for name, value in student.items():
        teacher[name] = value if rate == 1.0 else teacher[name] + rate * (value - teacher[name])
    mx.eval(teacher)


def zeros(parameters: Parameters) -> Parameters:
    """Float32 zeros of the same names and shapes."""
    return {name: mx.zeros(value.shape, mx.float32) for name, value in parameters.items()}
