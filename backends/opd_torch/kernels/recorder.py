"""Token steps on a GPU as CUDA graphs: one launch a step, since the host takes far longer to launch
a step's kernels than the GPU to run them.

A recorded step runs the same kernels on the same addresses every time. So a step changes its
tensors in place. A step with other shapes than the last runs as it is, which also loads its
kernels, and is recorded when it comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable

import torch

from opd_torch.model.load import Model


class Recorder:
    """Runs steps of `model`, and records them where the device and the model allow it."""

    refused = False
    """Whether CUDA has refused once in this process: it is logged once and not tried again."""

    def __init__(self, model: Model) -> None:
        # Without a family file caches grow, and kernels over weights in few bits may do what cannot
        # be recorded.
        floating = all(parameter.is_floating_point() for parameter in model.module.parameters())
        self.records = model.device.records_steps and model.family is not None and floating
        self._shape: Hashable = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Runs `step`; a step of another `shape` has other tensors."""
        if not self.records:
            step()
        elif shape != self._shape:
            self._shape, self._graph = shape, None
            step()
        elif graph := self._graph or self._record(step):
            graph.replay()
        else:
            step()

    def _record(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Records `step`; None if CUDA refuses, which runs none of it."""
        try:
            self._graph = None if self.refused else _recorded(step)
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


def _recorded(step: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """The graph of `step`, which does not run. `torch.cuda.graph` would first give all cached
    memory back to the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph
