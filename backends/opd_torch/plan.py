"""What `opd plan` asks of torch: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import transformers

from opd.errors import BackendError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Machine, Shapes
from opd.types import ModelOptions
from opd_torch.device import this_device
from opd_torch.families import family
from opd_torch.footprint import delta_bytes
from opd_torch.objective import CHUNK_BYTES


class BackendPlanner:
    """`opd.planner.Planner` for a GPU or for the CPU."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu

    def parameters(self, config: Config) -> Shapes:
        """Shapes of an empty model of transformers."""
        its = transformers.AutoConfig.for_model(**config)
        its.vision_config.vision_use_head = False  # no forward reads it
        with torch.device("meta"):
            model = getattr(transformers, family(its.model_type).architecture)(its)
        return {name: tuple(value.shape) for name, value in model.named_parameters()}

    def footprint(
        self,
        options: ModelOptions,
        config: Config,
        largest: int,
        lengths: tuple[int, int],
        here: bool,
    ) -> Footprint:
        """Of a row: float32 norms, casts of what enters products; less where kernels are fused."""
        full, half = options.adapters is None, options.dtype == "bfloat16"
        item, text = 2 if half else 4, SimpleNamespace(**config["text_config"])
        device = this_device("cpu")  # a GPU's record would need a GPU; these budgets are alike
        if not half:
            row = (12.0, 6.0) if full else (8.0, 5.5)
        elif self._gpu:
            row = (4.0, 2.75) if full else (4.0, 2.5)
        else:
            row = (13.0, 3.25) if full else (6.0, 3.0)
        recurs = delta_bytes(text, item) if hasattr(text, "linear_num_value_heads") else 0
        return Footprint(
            prompt=row,
            completion=row,
            patch=(4.0 + 2 * item, item),
            recurrence=(recurs, recurs),
            copies="always" if self._gpu and not half else "windows",
            score=0,
            scores_most=0,
            stream=4,
            recompute_above=device.checkpoint_above,
            backward=0.4,
            forward=0.6,
            frozen=4 if full else item,
            cast=item * (half and full),
            cast_tables=False,
            head_copy=(item * full + 4 * (not self._gpu)) * half,
            head=(2.0, 1.2, CHUNK_BYTES, CHUNK_BYTES if self._gpu else device.head_block_bytes),
            apply=0,
            keeps_tokens=0 if half else device.prefill_tokens,
        )

    def machine(self) -> Machine:
        """The first GPU, or the processor."""
        if self._gpu and not torch.cuda.is_available():
            raise BackendError("torch sees no CUDA GPU on this machine; name one with --device")
        device = torch.device("cuda" if self._gpu else "cpu")

        def product(rows: int, side: int, dtype: str) -> Callable[[], object]:
            kind = getattr(torch, dtype)
            a, b = (torch.ones(n, side, device=device, dtype=kind) for n in (rows, side))
            return lambda: (torch.mm(a, b), self._gpu and torch.cuda.synchronize())

        if not self._gpu:
            return Machine(
                this_device("cpu").name, host_memory(), 0.9, False, product, resident=True
            )
        about = torch.cuda.get_device_properties(device)
        return Machine(about.name, about.total_memory, 0.95, True, product)


CUDA = BackendPlanner(gpu=True)
CPU = BackendPlanner(gpu=False)
