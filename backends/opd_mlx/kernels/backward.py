"""A backward that is built before the gradients of the outputs are known.

`mx.vjp` needs the gradients of the outputs before the function has run. If they were computed
inside the trace, in the backward of a custom function, every array of the forward would stay alive
(84 arrays in a trial whose backward reads 25), and checkpoints would save nothing. So the backward
starts from buffers that are filled after the forward, through NumPy views: MLX's documentation says
that a write through such a view changes the array. `Backward.start` checks this on every use.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import cast

import mlx.core as mx
import numpy as np


class _ThreadState(threading.local):
    """Whether this thread is building a backward."""

    traced = False


_STATE = _ThreadState()


def traced() -> bool:
    """Whether the current computation of this thread is traced for a `Backward`."""
    return _STATE.traced


class Backward:
    """The `outputs` of `function` at `primals`, not evaluated yet, and the backward to the primals.

    Evaluate the outputs, then call `start` with the outputs' gradients.
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

        _STATE.traced = True
        try:
            _, self._gradients = mx.vjp(whole, list(primals), [mx.zeros(())])
        finally:
            _STATE.traced = False
        mx.eval(self._starts)

    def start(self, gradients: Sequence[mx.array]) -> list[mx.array]:
        """The gradients of the primals, from the float32 `gradients` of the outputs.

        They are not evaluated yet, and this object drops all arrays. Raises RuntimeError if MLX
        does not see the written gradients.
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
