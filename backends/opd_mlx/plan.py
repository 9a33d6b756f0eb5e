"""What `opd plan` asks of MLX: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

from opd.errors import ModelError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Machine, Shapes
from opd.types import ModelOptions
from opd_mlx.device import this_device
from opd_mlx.families import family
from opd_mlx.footprint import delta_bytes
from opd_mlx.layers.gated_delta import CHUNK
from opd_mlx.model.names import hugging_face
from opd_mlx.objective import CHUNK_BYTES


class BackendPlanner:
    """`opd.planner.Planner` for a Mac, and for MLX on a processor."""

    def parameters(self, config: Config) -> Shapes:
        """Shapes of mlx-vlm's module, whose random parameters are never computed."""
        of = family(config["model_type"])
        try:
            module = of.build(config, bool(config["tie_word_embeddings"]))
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"config.json cannot be used: {error}") from error
        named = {
            hugging_face(of, name): one.shape for name, one in tree_flatten(module.parameters())
        }
        # Channels of kernels come last in MLX, and second elsewhere.
        return {
            name: (size[0], size[-1], *size[1:-1]) if len(size) > 2 else tuple(size)
            for name, size in named.items()
        }

    def footprint(
        self,
        options: ModelOptions,
        config: Config,
        largest: int,
        lengths: tuple[int, int],
        here: bool,
    ) -> Footprint:
        """Of a row, in the type of computation: norms, sums, what products take."""
        full, half = options.adapters is None, options.dtype == "bfloat16"
        device, item, text = this_device(), 2 if half else 4, config["text_config"]
        row, recurrence = (3.0 * item, (1.55 + 0.25 * full) * item), (0.0, 0.0)
        if "linear_num_value_heads" in text:
            # The rule is solved in whole chunks, or in one that is shorter; a long row holds none.
            plain = delta_bytes(text, 1, segment=0)
            solved = delta_bytes(text, 1, device.delta_segment) - plain
            frozen = 1.0 if full else 0.65  # without gradients to convolution and norm
            prompt, completion = (
                frozen * plain + solved * (length <= device.delta_segment) * share
                for length in lengths
                for share in [
                    -(-length // CHUNK) * CHUNK / length if length > CHUNK else length / CHUNK
                ]
            )
            recurrence = prompt, completion
        return Footprint(
            prompt=row,
            completion=row,
            patch=(3.0 * item, 2.2 * item),
            recurrence=recurrence,
            copies="never",
            score=4,
            scores_most=device.kept_score_bytes,
            stream=item,
            recompute_above=device.checkpoint_above,
            backward=1.0,
            forward=0.6,
            frozen=item,
            cast=item * (half and full),
            cast_tables=True,
            head_copy=4 * (half and not full),
            head=(3.0, 5.0, CHUNK_BYTES, device.head_block_bytes if here else CHUNK_BYTES),
            apply=3 * max(device.gradient_bytes, 4 * largest),
            keeps_tokens=0 if half else device.prefill_tokens,
        )

    def machine(self) -> Machine:
        """The Mac's GPU, or the processor."""
        device, memory = this_device(), host_memory()

        def product(rows: int, side: int, dtype: str) -> Callable[[], object]:
            a, b = (mx.ones((n, side), dtype=getattr(mx, dtype)) for n in (rows, side))
            return lambda: mx.eval(a @ b)

        if not device.gpu:
            return Machine("CPU", memory, 0.9, False, product)
        usable = (device.memory or 0.75 * memory) / memory
        return Machine(device.name, memory, usable, True, product)


MLX = BackendPlanner()
