"""Compiles elementwise functions and token steps.

The host takes longer to build a token step than a GPU takes to run it; a compiled step is built
once. A compiled step reads and writes arrays of the same shapes every time, so it reads changing
arrays from the lists of a state and writes them back there. When shapes change, the first step runs
without compilation; the second is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import mlx.core as mx


@cache
def elementwise(function: Callable[..., Any], compiles: bool) -> Callable[..., Any]:
    """Compiles an elementwise `function` of arrays of any shape to one kernel, if `compiles`."""
    return mx.compile(function, shapeless=True) if compiles else function


class Recorder:
    """Runs steps that change the arrays in `state`, and compiles them if `compiles`.

    `state` consists of lists and dictionaries. All other arrays that a step reads must be
    evaluated, and the same in all steps of one shape.
    """

    def __init__(self, state: dict[str, Any], compiles: bool) -> None:
        self.compiles = compiles
        self._state = state
        self._shape: Hashable = None
        self._compiled: Callable[[], list[mx.array]] | None = None

    def run(self, shape: Hashable, step: Callable[[], list[mx.array]]) -> list[mx.array]:
        """Runs `step` and returns its result, not evaluated. Steps of equal `shape` must have
        arrays of equal shapes.
        """
        if not self.compiles:
            return step()
        if shape != self._shape:
            self._shape, self._compiled = shape, None
            return step()
        if self._compiled is None:
            self._compiled = mx.compile(step, inputs=self._state, outputs=self._state)
        return self._compiled()
