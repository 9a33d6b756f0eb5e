"""AdamW on float32 parameters, clipping by the global norm, and the teacher's moving average.

Source: Decoupled Weight Decay Regularization (arXiv 1711.05101), algorithm 2, as torch.optim.AdamW
computes it.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from opd.types import Update, UpdateResult
from opd_mlx.device import Device
from opd_mlx.kernels.recorder import elementwise
from opd_mlx.model import Parameters


class Optimizer:
    """AdamW with bias correction over the trained parameters: two moments for each parameter, by
    name, and the number of steps taken.
    """

    def __init__(self, parameters: Parameters, device: Device) -> None:
        self.parameters = parameters
        self.step = 0
        self.first, self.second = zeros(parameters), zeros(parameters)
        self._device = device

    def apply(self, gradient: Parameters, update: Update) -> UpdateResult:
        """Takes one step on `gradient`, which is emptied, and changes the parameters' dictionary in
        place. If the gradient's norm is not finite, nothing changes.
        """
        norm = global_norm(gradient, self._device)
        if not np.isfinite(norm):
            return UpdateResult(norm, taken=False)
        clip = update.gradient_clip
        scale = 1.0 if clip is None or norm == 0 else min(1.0, clip / norm)
        step = self.step + 1
        (b1, b2), rate = update.betas, update.learning_rate
        # Computed in double precision, so that each number is rounded to float32 only once.
        decay = 1 - rate * update.weight_decay
        correction, root = rate / (1 - b1**step), float(np.sqrt(1 - b2**step))
        numbers = [
            mx.array(number)
            for number in (scale, b1, 1 - b1, b2, 1 - b2, decay, correction, root, update.epsilon)
        ]
        adamw = elementwise(_adamw, self._device.compiles)
        state = self.parameters, self.first, self.second
        for names in _pieces(self.parameters, self._device.gradient_bytes):
            for name in names:
                moved = adamw(gradient.pop(name), *(arrays[name] for arrays in state), *numbers)
                for arrays, value in zip(state, moved, strict=True):
                    arrays[name] = value
                del moved, value
            mx.eval([[arrays[name] for name in names] for arrays in state])
        self.step = step
        return UpdateResult(norm, taken=True)


def global_norm(gradient: Parameters, device: Device) -> float:
    """The Euclidean norm of all tensors together.

    Each row is summed separately, because on a CPU MLX's sum over a whole array loses digits.
    """
    total = 0.0
    for names in _pieces(gradient, device.gradient_bytes):
        squares = [
            mx.square(gradient[name]).reshape(-1, gradient[name].shape[-1]).sum(-1)
            for name in names
        ]
        total += float(np.array(mx.concatenate(squares), np.float64).sum())
    return float(np.sqrt(total))


def move_teacher(teacher: Parameters, student: Parameters, rate: float, device: Device) -> None:
    """Computes teacher += rate * (student - teacher) in float32 and in place.

    Rate 1 copies the student to the bit, rate 0 changes nothing.
    """
    share = mx.array(rate)
    nearer = elementwise(_nearer, device.compiles)
    for names in _pieces(student, device.gradient_bytes):
        for name in names:
            old, target = teacher[name], student[name]
            teacher[name] = target if rate == 1.0 else nearer(old, target, share)
            del old, target
        mx.eval([teacher[name] for name in names])


def zeros(parameters: Parameters) -> Parameters:
    """Float32 zeros with the names and shapes of `parameters`."""
    return {name: mx.zeros(value.shape, mx.float32) for name, value in parameters.items()}


def _adamw(
    gradient: mx.array,
    value: mx.array,
    first: mx.array,
    second: mx.array,
    scale: mx.array,
    b1: mx.array,
    c1: mx.array,
    b2: mx.array,
    c2: mx.array,
    decay: mx.array,
    correction: mx.array,
    root: mx.array,
    epsilon: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """The parameter `value` and the two moments after a step."""
    gradient = scale * gradient
    first = b1 * first + c1 * gradient
    second = b2 * second + c2 * mx.square(gradient)
    moved = decay * value - correction * first / (mx.sqrt(second) / root + epsilon)
    return moved, first, second


def _nearer(teacher: mx.array, student: mx.array, share: mx.array) -> mx.array:
    return teacher + share * (student - teacher)


def _pieces(parameters: Parameters, most: int) -> Iterator[list[str]]:
    """Yields all names in pieces of at most `most` bytes, or of one tensor.

    MLX writes every result to a new array, so all parameters at once would be copied.
    """
    names, size = list[str](), 0
    for name, value in parameters.items():
        if names and size + value.nbytes > most:
            yield names
            names, size = [], 0
        names.append(name)
        size += value.nbytes
    if names:
        yield names
