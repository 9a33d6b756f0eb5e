"""Token steps on a GPU compiled: the host, which takes longer to build a small model's step than the GPU to run it, builds it once.

A compiled step reads and writes arrays of the same shapes every time. So it finds what changes in the lists of a state, and leaves there
what becomes of it; and one that has other shapes than the last is run as it is, and compiled when it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import mlx.core as mx

from opd_mlx.attention import FUSED


class Recorder:
    """Runs steps that change the arrays in `state`, and compiles them where that is worth its while: on a CPU it would ask for a compiler.

    `state` is of lists and dictionaries; all other arrays that a step reads must have been computed, and be the same in all steps of one
    shape.
    """

    def __init__(self, state: dict[str, Any]) -> None:
        self.records = FUSED
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
