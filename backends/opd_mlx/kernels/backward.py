"""A backward that is built before the gradients that it starts from are known.

`mx.vjp` wants cotangents before the function has run. Computing them within the trace, in the
backward of a custom function, would keep every array of the forward alive (84 in a trial whose
backward reads 25), and checkpoints would save nothing. So the backward starts from buffers that
are filled once the outputs are known: as MLX's documentation has it, what is written through a
NumPy view of an array is in the array. `Backward.start` checks that this holds on the device at
hand.
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
    """Whether this thread is building a `Backward` of what it computes now."""
    return _HERE.traced


class Backward:
    """`outputs` of `function` at `primals`, not evaluated yet, and the backward to the primals.

    Evaluate the outputs, then give `start` the gradients to them.
    """

    def __init__(
        self, function: Callable[..., Sequence[mx.array]], primals: Sequence[mx.array]
    ) -> None:
        self.outputs: list[mx.array] = []
        self._starts: list[mx.array] = []

        @mx.custom_function
        def end(outputs: list[mx.array]) -> mx.array:
            return mx.zeros(())

        @end.vjp
        def _(outputs: list[mx.array], cotangent: mx.array, value: mx.array) -> list[mx.array]:
            pairs = zip(self._starts, outputs, strict=True)
            return [start.astype(output.dtype) for start, output in pairs]

        def whole(*values: mx.array) -> mx.array:
            self.outputs = list(function(*values))
            self._starts = [mx.zeros(output.shape) for output in self.outputs]
            return cast("mx.array", end(self.outputs))

        _HERE.traced = True
        try:
            _, self._gradients = mx.vjp(whole, list(primals), [mx.zeros(())])
        finally:
            _HERE.traced = False
        mx.eval(self._starts)

    def start(self, gradients: Sequence[mx.array]) -> list[mx.array]:
        """Gradients to the primals from the float32 `gradients` to the outputs.

        They are not evaluated yet, and this object keeps nothing of them. Raises RuntimeError where
        MLX does not see what the backward starts from.
        """
        for start, gradient in zip(self._starts, gradients, strict=True):
            np.copyto(np.array(start, copy=False), np.array(gradient))
            if not mx.array_equal(start, gradient, equal_nan=True):
                raise RuntimeError(
                    "MLX does not see what was written through a view of its array, "
                    "so no gradient can be computed"
                )
        to_primals, self._gradients = self._gradients, []
        self.outputs, self._starts = [], []
        return to_primals
