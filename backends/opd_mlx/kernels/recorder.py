"""Compiles elementwise functions, and token steps, which the host builds more slowly than a GPU
runs.

A compiled step reads and writes arrays of the same shapes every time. So the step finds what
changes in the lists of a state, and writes it back there; a step whose shapes differ from the last
step's is run as it is, and compiled when those shapes come again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import mlx.core as mx


@cache
def elementwise(function: Callable[..., Any], compiles: bool) -> Callable[..., Any]:
    """An elementwise `function` of arrays of any shape, as one kernel if MLX `compiles`."""
    return mx.compile(function, shapeless=True) if compiles else function


class Recorder:
    """Runs steps that change the arrays in `state`, and compiles them if MLX `compiles`.

    `state` consists of lists and dictionaries; all other arrays that a step reads must have been
    computed, and be the same in all steps of one shape.
    """

    def __init__(self, state: dict[str, Any], compiles: bool) -> None:
        self.compiles = compiles
        self._state = state
        self._shape: Hashable = None
        self._compiled: Callable[[], list[mx.array]] | None = None

    def run(self, shape: Hashable, step: Callable[[], list[mx.array]]) -> list[mx.array]:
        """What `step` returns, not evaluated; steps of different shapes have different `shape`."""
        if not self.compiles:
            return step()
        if shape != self._shape:
            self._shape, self._compiled = shape, None
            return step()
        if self._compiled is None:
            self._compiled = mx.compile(step, inputs=self._state, outputs=self._state)
        return self._compiled()
