"""What MLX compiles on a GPU: elementwise functions, and token steps, whose building by the host outlasts a small model's run on the GPU.

A compiled step reads and writes arrays of the same shapes every time. So it finds what changes in the lists of a state, and leaves there
what becomes of it; and one that has other shapes than the last is run as it is, and compiled when it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import mlx.core as mx

COMPILES = mx.default_device() == mx.gpu
"""Where MLX compiles by itself; for a CPU it asks for a compiler, and many seconds."""

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """An elementwise `function` of arrays as one kernel, for arrays of any shape, where MLX compiles by itself."""
    return cast("Function", mx.compile(function, shapeless=True)) if COMPILES else function


class Recorder:
    """Runs steps that change the arrays in `state`, and compiles them where MLX can by itself.

    `state` is of lists and dictionaries; all other arrays that a step reads must have been computed, and be the same in all steps of one
    shape.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.records = COMPILES
        self._state = state
        self._shape: Hashable = None
        self._compiled: Callable[[], list[mx.array]] | None = None

    def run(self, shape: Hashable, step: Callable[[], list[mx.array]]) -> list[mx.array]:
        """What `step` returns, not evaluated; `shape` tells apart steps whose arrays are others."""
        if not self.records:
            return step()
        if shape != self._shape:
            self._shape, self._compiled = shape, None
            return step()
        if self._compiled is None:
            self._compiled = mx.compile(step, inputs=self._state, outputs=self._state)
        return self._compiled()
