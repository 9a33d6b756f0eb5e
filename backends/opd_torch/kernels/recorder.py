"""Token steps on a GPU as CUDA graphs: the host, which takes far longer to launch a step's kernels than the GPU to run them, launches one.

A recorded step runs the same kernels on the same addresses every time. So a step changes its tensors in place, and one that has other
shapes than the last is run as it is, which also loads its kernels, and recorded when it comes again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Any

import torch


class Recorder:
    """Runs steps of `model` on `device`, and records them where that can be done."""

    refused = False
    """Whether CUDA has refused once in this process, which is said once and not tried again."""

    def __init__(self, device: torch.device, model: Any) -> None:
        # A model without a family file keeps caches that grow, and what kernels over weights in few bits do is not ours to know.
        floating = all(parameter.is_floating_point() for parameter in model.parameters())
        self.records = device.type == "cuda" and model.family is not None and floating
        self._shape: Hashable = None
        self._graph: Any = None

    def run(self, shape: Hashable, step: Callable[[], None]) -> None:
        """Runs `step`; `shape` tells apart steps whose tensors are others."""
        if not self.records:
            step()
        elif shape != self._shape:
            self._shape, self._graph = shape, None
            step()
        elif self._graph is not None or self._record(step):
            self._graph.replay()
        else:
            step()

    def _record(self, step: Callable[[], None]) -> bool:
        """Whether `step` is recorded now. Where CUDA refuses, which does not run any of it, steps stay as they are."""
        try:
            self._graph = None if self.refused else _recorded(step)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            Recorder.refused = True
            reason = str(error).strip().partition("\n")[0]
            logging.getLogger(__name__).warning("token steps run one by one, several times slower: CUDA cannot record them (%s)", reason)
        return self._graph is not None


def _recorded(step: Callable[[], None]) -> Any:
    """The graph of `step`, which is not run. `torch.cuda.graph` would give all cached memory back to the device first."""
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
