"""The processes of one run, which mx.distributed connects if `mlx.launch` started several."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


class Processes:
    """The first three members of `opd.backend.Backend`."""

    def __init__(self) -> None:
        self._processes = mx.distributed.init()

    @property
    def rank(self) -> int:
        """The index of this process."""
        return int(self._processes.rank())

    @property
    def size(self) -> int:
        """The number of processes."""
        return int(self._processes.size())

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums elementwise over all processes."""
        if self.size == 1:
            return values.copy()
        local = mx.array(values, dtype=mx.float64)
        summed = mx.distributed.all_sum(local, group=self._processes, stream=mx.cpu)
        return np.array(summed, dtype=np.float64)
