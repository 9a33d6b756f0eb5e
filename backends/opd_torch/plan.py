"""Answers `opd plan` for torch: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch

from opd.errors import BackendError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Machine, Shapes
from opd.types import ModelOptions
from opd_torch.device import this_device
from opd_torch.families import family
from opd_torch.footprint import layer_bytes, parameters
from opd_torch.objective import CHUNK_BYTES


class BackendPlanner:
    """`opd.planner.Planner` for a GPU or for the CPU."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu

    def parameters(self, config: Config) -> Shapes:
        """The shapes of all parameters of a model."""
        return parameters(config)

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, here: bool
    ) -> Footprint:
        """The bytes of a micro-batch."""
        full, half, gpu = options.adapters is None, options.dtype == "bfloat16", self._gpu
        item = 2 if half else 4
        return Footprint(
            *layer_bytes(config["text_config"], item, gpu, full),
            recompute_above=options.checkpoint_above,
            stream=4,
            blocks=family(config["model_type"]).image_blocks,
            frozen=4 if full else item,
            cast=item * (half and full),
            keeps_casts=False,
            chunk=CHUNK_BYTES,
            head=(3.2, 3.2) if gpu else (2.0, 2.0),
            head_copy=4 * (half and not gpu),
            sums=0,
            cache_sums=0,
            apply=0,
            keeps_tokens=0 if half else this_device("cpu").prefill_tokens,
        )

    def machine(self) -> Machine:
        """The first GPU, or the processor. Raises BackendError without a GPU."""
        if self._gpu and not torch.cuda.is_available():
            raise BackendError("torch sees no CUDA GPU on this machine; name one with --device")
        device = torch.device("cuda" if self._gpu else "cpu")

        def product(rows: int, side: int, dtype: str) -> Callable[[], object]:
            kind = getattr(torch, dtype)
            a, b = (torch.ones(n, side, device=device, dtype=kind) for n in (rows, side))

            def multiply() -> None:
                torch.mm(a, b)
                if self._gpu:
                    torch.cuda.synchronize()

            return multiply

        if not self._gpu:
            name = this_device("cpu").name
            return Machine(name, host_memory(), 0.9, False, product, resident=True)
        about = torch.cuda.get_device_properties(device)
        return Machine(about.name, about.total_memory, 0.95, True, product)


CUDA = BackendPlanner(gpu=True)
CPU = BackendPlanner(gpu=False)
