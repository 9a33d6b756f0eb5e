"""A backward that is built before it is known where it starts.

`mx.vjp` wants cotangents before the function has run. To compute them within the trace, in the backward of a custom function, keeps
every array of the forward alive (84 in a trial whose backward reads 25), and checkpoints save nothing there. So the backward starts from
buffers which are filled once the outputs are known: in MLX, as its documentation has it, what is written through a NumPy view of an array
is in the array. That it is so on the device at hand is checked each time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import numpy as np


class _Here(threading.local):
    """Whether this thread builds a backward."""

    traced = False


_HERE = _Here()


def traced() -> bool:
    """Whether a `Backward` is being built of what is computed now."""
    return _HERE.traced


class Backward:
    """`outputs` of `function` at `primals`, not evaluated yet, and the backward to the primals.

    Evaluate the outputs, then give `start` the gradients to them.
    """

    def __init__(self, function: Callable[..., Sequence[mx.array]], primals: Sequence[mx.array]) -> None:
        self.outputs: list[mx.array] = []
        self._starts: list[mx.array] = []

        @mx.custom_function
        def end(outputs: list[mx.array]) -> mx.array:
            return mx.zeros(())

        @end.vjp
        def _(outputs: list[mx.array], slope: mx.array, value: mx.array) -> list[mx.array]:
            return [start.astype(output.dtype) for start, output in zip(self._starts, outputs, strict=True)]

        def whole(*values: mx.array) -> mx.array:
            self.outputs = list(function(*values))
            self._starts = [mx.zeros(output.shape) for output in self.outputs]
            return cast("mx.array", end(self.outputs))

        _HERE.traced = True
        try:
            _, self._slopes = mx.vjp(whole, list(primals), [mx.zeros(())])
        finally:
            _HERE.traced = False
        mx.eval(self._starts)

    def start(self, gradients: Sequence[mx.array]) -> list[mx.array]:
        """Starts at the float32 gradients to the outputs; the slopes to the primals, not evaluated yet, and nothing is kept of them here.

        Raises RuntimeError where MLX does not see what the backward starts from.
        """
        for start, gradient in zip(self._starts, gradients, strict=True):
            np.copyto(np.array(start, copy=False), np.array(gradient))
            if not mx.array_equal(start, gradient, equal_nan=True):
                raise RuntimeError("MLX does not see what was written through a view of its array, so no gradient can be computed")
        slopes, self.outputs, self._starts, self._slopes = self._slopes, [], [], []
        return slopes
