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
from opd_torch.backend import cpu
from opd_torch.families import family
from opd_torch.footprint import CHECKPOINT_ABOVE, delta_bytes
from opd_torch.objective import BLOCK_BYTES, CHUNK_BYTES
from opd_torch.sampling import PREFILL_TOKENS


class TorchPlanner:
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
        self, options: ModelOptions, config: Config, largest: int, prompt: int, here: bool
    ) -> Footprint:
        """Of a row: float32 norms and casts of what enters products, or fused kernels' own arrays."""
        full, half = options.adapters is None, options.dtype == "bfloat16"
        item, text = 2 if half else 4, SimpleNamespace(**config["text_config"])
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
            recompute_above=CHECKPOINT_ABOVE,
            backward=0.4,
            forward=0.6,
            frozen=4 if full else item,
            cast=item * (half and full),
            cast_tables=False,
            head_copy=(item * full + 4 * (not self._gpu)) * half,
            head=(2.0, 1.2, CHUNK_BYTES, CHUNK_BYTES if self._gpu else BLOCK_BYTES),
            apply=0,
            keeps_tokens=0 if half else PREFILL_TOKENS,
        )

    def machine(self) -> Machine:
        """The first GPU, or the processor."""
        if self._gpu and not torch.cuda.is_available():
            raise BackendError("torch sees no CUDA GPU on this machine; name one with --device")
        device = torch.device("cuda" if self._gpu else "cpu")

        def timed(run: Callable[[], object]) -> Callable[[], object]:
            return (lambda: (run(), torch.cuda.synchronize())) if self._gpu else run

        def product(side: int, dtype: str) -> Callable[[], object]:
            matrix = torch.ones(side, side, device=device, dtype=getattr(torch, dtype))
            return timed(lambda: torch.mm(matrix, matrix))

        def copy(size: int) -> Callable[[], object]:
            source = torch.ones(size // 4, device=device)
            target = torch.empty_like(source)
            return timed(lambda: target.copy_(source))

        if not self._gpu:
            return Machine(cpu(), host_memory(), 0.9, product, resident=True)
        memory = torch.cuda.get_device_properties(device).total_memory
        return Machine(torch.cuda.get_device_name(device), memory, 0.95, product, copy)


CUDA, CPU = TorchPlanner(gpu=True), TorchPlanner(gpu=False)
