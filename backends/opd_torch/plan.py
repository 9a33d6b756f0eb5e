"""Answers `opd plan` for torch: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from opd.errors import BackendError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Layer, Lengths, Machine, Rows, Shapes
from opd.types import ModelOptions
from opd_torch.device import this_device
from opd_torch.families import family
from opd_torch.footprint import delta_bytes, estimate
from opd_torch.layers.gated_delta import CHUNK
from opd_torch.objective import CHUNK_BYTES


class BackendPlanner:
    """`opd.planner.Planner` for a GPU or for the CPU."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu

    def parameters(self, config: Config) -> Shapes:
        """The shapes of all parameters, from transformers' model on the meta device."""
        settings = _config(config)
        with torch.device("meta"):
            model = getattr(transformers, family(settings.model_type).architecture)(settings)
        return {name: tuple(value.shape) for name, value in model.named_parameters()}

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, here: bool
    ) -> Footprint:
        """The bytes of a micro-batch. A layer holds norms in float32 and casts of the inputs of
        products for every row, and less if kernels are fused.
        """
        full, half, gpu = options.adapters is None, options.dtype == "bfloat16", self._gpu
        settings, device, item = _config(config), this_device("cpu"), 2 if half else 4

        def layer_bytes(layer: Layer, rows: Rows) -> tuple[float, float]:
            inputs = layer.wide + layer.query + layer.key + layer.gate
            if rows.kind == "patches":
                row = 8.0 * layer.norms + 2 * item * inputs
            elif gpu and half:
                fused = inputs + 0.35 * (layer.query + layer.key)
                row = 4 * layer.norms + (4.1 if full else 3.75) * fused
            else:
                row = 4.0 * (1 + full) * (layer.norms + layer.turned)
                row += 2 * item * (layer.width + inputs)
            if layer.state:
                # Rows longer than a chunk are padded to whole chunks. Adapters hold less, because
                # convolution and norm get no gradient.
                chunks = -(-rows.length // CHUNK) * CHUNK if rows.length > CHUNK else rows.length
                convolved, solved = delta_bytes(settings.text_config, item)
                rule = convolved + 0.9 * solved * chunks / rows.length
                row += rule * (1 if full else 0.85)
            # Where `kernels.joined` does not run, each completion copies the prompt's keys.
            copied = layer.window is not None or (gpu and not half)
            held = rows.total * row + 2 * item * layer.key * rows.count * rows.before * copied
            return held, 0.35 * held

        def activations(lengths: Lengths) -> int:
            patches, prompts, completions = (rows.total for rows in lengths)
            return estimate(settings, item, gpu and half, prompts + completions, patches)

        return Footprint(
            estimate=activations,
            layer=layer_bytes,
            blocks=family(settings.model_type).image_blocks,
            stream=4,
            recompute_above=options.checkpoint_above,
            frozen=4 if full else item,
            cast=item * (half and full),
            keeps_casts=False,
            chunk=CHUNK_BYTES,
            head=(3.2, 3.2) if gpu else (2.0, 2.0),
            head_copy=4 * (half and not gpu),
            sums=0,
            cache_sums=0,
            apply=0,
            keeps_tokens=0 if half else device.prefill_tokens,
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
            return Machine(
                this_device("cpu").name, host_memory(), 0.9, False, product, resident=True
            )
        about = torch.cuda.get_device_properties(device)
        return Machine(about.name, about.total_memory, 0.95, True, product)


def _config(config: Config) -> Any:
    """transformers' configuration of a model."""
    settings = transformers.AutoConfig.for_model(**config)
    settings.vision_config.vision_use_head = False  # no forward uses the head
    return settings


CUDA = BackendPlanner(gpu=True)
CPU = BackendPlanner(gpu=False)
