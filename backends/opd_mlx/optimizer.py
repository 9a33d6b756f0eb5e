"""AdamW with bias correction over float32 masters, clipping by the global norm, and the teacher's moving average.

Source: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as torch.optim.AdamW computes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from opd.types import Update, UpdateResult
from opd_mlx.gradient import TOGETHER
from opd_mlx.kernels.recorder import compiled
from opd_mlx.model import Parameters


class Optimizer:
    """AdamW with bias correction over the trained parameters, by name; its state is two moments a parameter and a step count."""

    def __init__(self, parameters: Parameters) -> None:
        self.parameters = parameters
        self.step = 0
        self.first, self.second = zeros(parameters), zeros(parameters)

    def apply(self, gradient: Parameters, update: Update) -> UpdateResult:
        """One step on `gradient`, which is consumed; it changes the parameters' dictionary in place. Where the norm is not finite nothing
        changes.
        """
        norm = global_norm(gradient)
        if not np.isfinite(norm):
            return UpdateResult(norm, taken=False)
        scale = 1.0 if update.gradient_clip is None or norm == 0 else min(1.0, update.gradient_clip / norm)
        step = self.step + 1
        (b1, b2), rate = update.betas, update.learning_rate
        # Worked out in double precision, so that float32 sees each of them rounded once.
        kept, correction, root = 1 - rate * update.weight_decay, rate / (1 - b1**step), float(np.sqrt(1 - b2**step))
        numbers = [mx.array(number) for number in (scale, b1, 1 - b1, b2, 1 - b2, kept, correction, root, update.epsilon)]
        held = self.parameters, self.first, self.second
        for names in _pieces(self.parameters):
            for name in names:
                moved = _moved(gradient.pop(name), *(one[name] for one in held), *numbers)
                for one, value in zip(held, moved, strict=True):
                    one[name] = value
                del moved, value
            mx.eval([[one[name] for name in names] for one in held])
        self.step = step
        return UpdateResult(norm, taken=True)


def global_norm(gradient: Parameters) -> float:
    """Euclidean norm over all tensors. Rows are summed one by one: MLX's sum over a whole array loses digits on the CPU."""
    total = 0.0
    for names in _pieces(gradient):
        squares = [mx.square(gradient[name]).reshape(-1, gradient[name].shape[-1]).sum(-1) for name in names]
        total += float(np.array(mx.concatenate(squares), np.float64).sum())
    return float(np.sqrt(total))


def move_teacher(teacher: Parameters, student: Parameters, rate: float) -> None:
    """theta_T += rate * (theta_S - theta_T), in float32 and in place; rate 1 copies to the bit."""
    share = mx.array(rate)
    for names in _pieces(student):
        for name in names:
            teacher[name] = student[name] if rate == 1.0 else _nearer(teacher[name], student[name], share)
        mx.eval([teacher[name] for name in names])


def zeros(parameters: Parameters) -> Parameters:
    """Float32 zeros of the same names and shapes."""
    return {name: mx.zeros(value.shape, mx.float32) for name, value in parameters.items()}


@compiled
def _moved(
    gradient: mx.array,
    value: mx.array,
    first: mx.array,
    second: mx.array,
    scale: mx.array,
    b1: mx.array,
    c1: mx.array,
    b2: mx.array,
    c2: mx.array,
    kept: mx.array,
    correction: mx.array,
    root: mx.array,
    epsilon: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """A parameter and its moments after a step."""
    gradient = scale * gradient
    first = b1 * first + c1 * gradient
    second = b2 * second + c2 * mx.square(gradient)
    return kept * value - correction * first / (mx.sqrt(second) / root + epsilon), first, second


@compiled
def _nearer(teacher: mx.array, student: mx.array, share: mx.array) -> mx.array:
    return teacher + share * (student - teacher)


def _pieces(parameters: Parameters) -> Iterator[list[str]]:
    """All names, as many at a time as have TOGETHER bytes: MLX makes every array anew, and all at once would be copies of all."""
    names, size = list[str](), 0
    for name, value in parameters.items():
        if names and size + value.nbytes > TOGETHER:
            yield names
            names, size = [], 0
        names.append(name)
        size += value.nbytes
    if names:
        yield names
