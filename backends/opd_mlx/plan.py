"""Answers `opd plan` for MLX: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from opd.memory import host_memory
from opd.planner import Config, Footprint, Machine, Shapes
from opd.types import ModelOptions
from opd_mlx.device import this_device
from opd_mlx.families import family
from opd_mlx.footprint import layer_bytes, parameters
from opd_mlx.objective import CHUNK_BYTES


class BackendPlanner:
    """`opd.planner.Planner` for a Mac, and for MLX on a processor."""

    def parameters(self, config: Config) -> Shapes:
        """The shapes of all parameters of a model. Raises ModelError."""
        return parameters(config)

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, here: bool
    ) -> Footprint:
        """The bytes of a micro-batch."""
        full, half = options.adapters is None, options.dtype == "bfloat16"
        device, item = this_device(), 2 if half else 4
        return Footprint(
            layer_bytes(config, item, device, full),
            margin=1.0,
            recompute_above=options.checkpoint_above,
            stream=item,
            blocks=family(config["model_type"]).image_blocks,
            frozen=item,
            cast=item * (half and full),
            keeps_casts=True,
            chunk=CHUNK_BYTES,
            head=(3.0 if here and not device.gpu else 8.0, 2.0),
            head_copy=4 * (half and not full),
            sums=device.gradient_bytes,
            cache_sums=4,
            apply=3 * max(device.gradient_bytes, 4 * largest),
            keeps_tokens=0 if half else device.prefill_tokens,
        )

    def machine(self) -> Machine:
        """The Mac's GPU, or the processor."""
        device, memory = this_device(), host_memory()

        def product(rows: int, side: int, numbers: str) -> Callable[[], object]:
            packed = numbers.startswith("packed")
            kind = mx.float32 if packed else getattr(mx, numbers)
            a, b = (mx.ones((n, side), dtype=kind) for n in (rows, side))
            if not packed:
                return lambda: mx.eval(a @ b)
            weights, back = mx.quantize(b), numbers == "packed back"
            return lambda: mx.eval(mx.quantized_matmul(a, *weights, transpose=not back))

        if not device.gpu:
            # On a processor products with packed weights are plain loops; on Metal they are as fast
            # as others.
            return Machine("CPU", memory, 0.9, False, product, packed=True)
        usable = (device.memory or 0.75 * memory) / memory
        return Machine(device.name, memory, usable, True, product)


MLX = BackendPlanner()
