"""The processes of one run, which torch.distributed connects."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed


class Processes:
    """The first three members of `opd.backend.Backend`; sums are taken on `device`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @property
    def rank(self) -> int:
        """The index of this process."""
        return distributed.get_rank() if distributed.is_initialized() else 0

    @property
    def size(self) -> int:
        """The number of processes."""
        return distributed.get_world_size() if distributed.is_initialized() else 1

    def total(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums elementwise over all processes."""
        if self.size == 1:
            return values.copy()
        summed = torch.from_numpy(values.astype(np.float64)).to(self._device)
        distributed.all_reduce(summed)
        return np.asarray(summed.cpu().numpy(), dtype=np.float64)
