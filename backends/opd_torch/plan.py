"""What `opd plan` asks of torch: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

from opd.errors import BackendError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Lengths, Machine, Row, Shapes
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
        """Shapes of an empty model of transformers."""
        its = _config(config)
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
        full, half, gpu = options.adapters is None, options.dtype == "bfloat16", self._gpu
        its = _config(config)
        device, item, text = this_device("cpu"), 2 if half else 4, its.text_config
        if gpu and half:
            wide = 4.1 if full else 3.75
            row = Row(0.0, 4.0, wide, 1.35 * wide, 1.35 * wide, gate=wide)
        else:
            # Of a norm the row and what is normalised, of a product in half precision its input.
            casts = 5 if half and full else 2
            row = Row(
                *(casts * item, 4.0 * (1 + full), 2.0 * item, 2.0 * item, 2.0 * item),
                turned=4.0 + item * full,
                gate=3.0 * item,
            )

        def with_rule(length: int) -> Row:
            # The delta rule is solved in whole chunks, or in one that is shorter.
            if not hasattr(text, "linear_num_value_heads"):
                return row
            heads, rule = text.linear_num_value_heads, delta_bytes(text, 0)
            convolved, values = delta_bytes(text, item) - rule, heads * text.linear_value_head_dim
            # Norm and gate take tokens as they are.
            rule -= 24 * values
            chunks = -(-length // CHUNK) * CHUNK / length if length > CHUNK else 1.0
            held = convolved + 24 * values + chunks * rule - 24 * heads * max(0, CHUNK - length)
            if not full:  # without gradients to convolution and norm
                held -= convolved / 3 + 8 * values
            return row._replace(recurrence=held, passing=-0.2 * held)

        def wanted(rows: Lengths) -> int:
            tokens = rows.before + rows.completions * rows.tokens
            patches = rows.images * rows.patches
            return estimate(its, item, gpu and half, rows.prompts * tokens, rows.prompts * patches)

        return Footprint(
            estimate=wanted,
            prompt=with_rule(lengths[0]),
            completion=with_rule(lengths[1]),
            patch=Row(0.0, 4.0 + item, 2.0 * item, 2.0 * item, 2.0 * item, turned=item),
            copies="always" if gpu and not half else "windows",
            blocks=family(its.model_type).image_blocks,
            scores=(0, 0, 0, 0),
            stream=4,
            recompute_above=device.checkpoint_above,
            backward=0.4,
            forward=(0.6, 0.55),
            frozen=4 if full else item,
            cast=(item * (half and full), 0),
            cast_tables=False,
            head_copy=(item * full + 4 * (not gpu)) * half,
            head=(2.0, 1.2, CHUNK_BYTES, CHUNK_BYTES if gpu else device.head_block_bytes),
            head_late=0,
            sums=None,
            cache_sums=0,
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
    """The configuration as transformers has it."""
    its = transformers.AutoConfig.for_model(**config)
    its.vision_config.vision_use_head = False  # no forward reads it
    return its


CUDA = BackendPlanner(gpu=True)
CPU = BackendPlanner(gpu=False)
