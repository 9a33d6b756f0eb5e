"""What `opd plan` asks of MLX: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

from opd.errors import ModelError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Lengths, Machine, Row, Shapes
from opd.types import ModelOptions
from opd_mlx.device import this_device
from opd_mlx.families import family
from opd_mlx.footprint import delta_bytes, estimate
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
        parameters = dict(tree_flatten(module.parameters()))
        named = {hugging_face(of, name): one.shape for name, one in parameters.items()}
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
        gelu = "gelu" in str(text.get("hidden_activation") or text.get("hidden_act"))
        gated = config["vision_config"]["hidden_act"] == "silu"

        def row(length: int, query: int, key: int) -> Row:
            wide = (4 + full + gelu) / 2
            found = Row(2 * item, 2 * item, wide * item, query * item, key * item, gate=3.0 * item)
            if "linear_num_value_heads" not in text:
                return found
            # The rule is solved in whole chunks, or in one that is shorter; a long row holds none,
            # and its backward solves a segment at a time.
            plain = float(delta_bytes(text, 1, segment=0))
            solved = delta_bytes(text, 1, device.delta_segment) - plain
            chunks = -(-length // CHUNK) * CHUNK if length > CHUNK else length * length / CHUNK
            solved *= chunks / length
            plain *= 1.0 if full else 0.65  # without gradients to convolution and norm
            if length > device.delta_segment:
                passing = solved * device.delta_segment / length
                return found._replace(recurrence=plain, passing=passing)
            return found._replace(recurrence=plain + solved, passing=-0.4 * (plain + solved))

        def wanted(rows: Lengths) -> int:
            images = [(rows.images, rows.patches)] * rows.prompts
            return estimate(config, item, device, rows[:4], images)

        before, tokens = lengths
        return Footprint(
            estimate=wanted,
            prompt=row(before, 4, 5),
            completion=row(tokens, 5, 3),
            patch=Row(12.0 * item, 0.0, (2.5 if gated else 5.0) * item, 0.0, 0.0),
            copies="never",
            blocks=family(config["model_type"]).image_blocks,
            scores=(
                *(4, device.kept_score_bytes, device.score_block_rows),
                4 * device.score_block_bytes,
            ),
            stream=item,
            recompute_above=device.checkpoint_above,
            backward=1.0,
            forward=(0.6, 0.5),
            frozen=item,
            cast=(item * (half and full),) * 2,
            cast_tables=True,
            head_copy=4 * (half and not full),
            head=(3.0, 5.0, CHUNK_BYTES, device.head_block_bytes if here else CHUNK_BYTES),
            head_late=2,
            sums=device.gradient_bytes,
            cache_sums=4,
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
