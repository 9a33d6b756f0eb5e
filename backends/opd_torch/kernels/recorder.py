"""Records token steps on a GPU as CUDA graphs.

The host takes far longer to launch a step's kernels one by one than the GPU takes to run them; a
graph is one launch. A recorded step runs the same kernels on the same addresses every time, so
steps change tensors in place. When shapes change, the first step runs without recording, which also
loads the kernels; the second is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from opd_torch.device import RecordedStep, RecordStep
from opd_torch.model.load import Model


class Recorder:
    """Runs steps of `model`, and records them if the device and the model allow it."""

    refused = False
    """Whether CUDA has refused to record in this process. It is logged once and not tried again."""

    def __init__(self, model: Model) -> None:
        # Without a family file caches grow. Kernels for quantised weights may do what cannot be
        # recorded.
        floating = all(parameter.is_floating_point() for parameter in model.module.parameters())
        record = model.device.record_step
        self._record_step = record if model.family is not None and floating else None
        self._shape: Hashable = None
        self._graph: RecordedStep | None = None

    @property
    def records(self) -> bool:
        """Whether steps are recorded."""
        return self._record_step is not None

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Runs `step`. Steps of equal `shape` must use the same tensors."""
        if self._record_step is None:
            step()
        elif shape != self._shape:
            self._shape, self._graph = shape, None
            step()
        elif graph := self._graph or self._recorded(step, self._record_step):
            graph.replay()
        else:
            step()

    def _recorded(self, step: Callable[[], None], record: RecordStep) -> RecordedStep | None:
        """Records `step` without running it; returns None if CUDA refuses."""
        try:
            self._graph = None if self.refused else record(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            Recorder.refused = True
            reason = str(error).strip().partition("\n")[0]
            logging.getLogger(__name__).warning(
                "token steps run one by one, several times slower: CUDA cannot record them (%s)",
                reason,
            )
        return self._graph
