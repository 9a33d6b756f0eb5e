"""Token steps on a GPU as CUDA graphs: the host, which takes far longer to launch a step's kernels than the GPU to run them, launches one.

A recorded step runs the same kernels on the same addresses every time. So a step changes its tensors in place, and one that has other
shapes than the last is run as it is, which also loads its kernels, and recorded when it comes again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Recorder:
    """Runs steps of `model` on `device`, and records them where that can be done."""

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
        else:
            if self._graph is None:
                self._graph = _recorded(step)
            self._graph.replay()


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
