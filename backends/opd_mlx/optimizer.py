"""AdamW with bias correction over float32 masters, clipping by the global norm, moving average.

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
    """AdamW over the trained parameters by name: two moments a parameter, and a step count."""

    def __init__(self, parameters: Parameters, device: Device) -> None:
        self.parameters = parameters
        self.step = 0
        self.first, self.second = zeros(parameters), zeros(parameters)
        self._device = device

    def apply(self, gradient: Parameters, update: Update) -> UpdateResult:
        """One step on `gradient`, which is consumed; changes the parameters' dictionary in place.

        Nothing changes if the norm is not finite.
        """
        norm = global_norm(gradient, self._device)
        if not np.isfinite(norm):
            return UpdateResult(norm, taken=False)
        clip = update.gradient_clip
        scale = 1.0 if clip is None or norm == 0 else min(1.0, clip / norm)
        step = self.step + 1
        (b1, b2), rate = update.betas, update.learning_rate
        # In double precision, so that each is rounded to float32 once.
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
                moved = adamw(gradient.pop(name), *(one[name] for one in state), *numbers)
                for one, value in zip(state, moved, strict=True):
                    one[name] = value
                del moved, value
            mx.eval([[one[name] for name in names] for one in state])
        self.step = step
        return UpdateResult(norm, taken=True)


def global_norm(gradient: Parameters, device: Device) -> float:
    """Euclidean norm over all tensors.

    Rows are summed one by one: MLX's sum over a whole array loses digits on the CPU.
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
    """theta_T += rate * (theta_S - theta_T), in float32 and in place; rate 1 copies to the bit."""
    share = mx.array(rate)
    nearer = elementwise(_nearer, device.compiles)
    for names in _pieces(student, device.gradient_bytes):
        for name in names:
            one, other = teacher[name], student[name]
            teacher[name] = other if rate == 1.0 else nearer(one, other, share)
            del one, other
        mx.eval([teacher[name] for name in names])


def zeros(parameters: Parameters) -> Parameters:
    """Float32 zeros of the same names and shapes."""
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
    """A parameter and its moments after a step."""
    gradient = scale * gradient
    first = b1 * first + c1 * gradient
    second = b2 * second + c2 * mx.square(gradient)
    moved = decay * value - correction * first / (mx.sqrt(second) / root + epsilon)
    return moved, first, second


def _nearer(teacher: mx.array, student: mx.array, share: mx.array) -> mx.array:
    return teacher + share * (student - teacher)


def _pieces(parameters: Parameters, most: int) -> Iterator[list[str]]:
    """All names, as many at a time as have `most` bytes.

    MLX makes every array anew: all at once would be a copy of all.
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
