"""Answers `opd plan` for MLX: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

from opd.errors import ModelError
from opd.memory import host_memory
from opd.planner import Config, Footprint, Layer, Lengths, Machine, Rows, Shapes
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
        """The shapes of all parameters, from mlx-vlm's module, whose random parameters are never
        evaluated. Raises ModelError.
        """
        kind = family(config["model_type"])
        try:
            module = kind.build(config, bool(config["tie_word_embeddings"]))
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ModelError(f"config.json cannot be used: {error}") from error
        parameters = dict(tree_flatten(module.parameters()))
        named = {hugging_face(kind, name): value.shape for name, value in parameters.items()}
        # A convolution's channels are last in MLX and second elsewhere.
        return {
            name: (size[0], size[-1], *size[1:-1]) if len(size) > 2 else tuple(size)
            for name, size in named.items()
        }

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, here: bool
    ) -> Footprint:
        """The bytes of a micro-batch. A layer holds norms, sums and the inputs of products for
        every row, in the type of computation.
        """
        full, half = options.adapters is None, options.dtype == "bfloat16"
        device, item, text = this_device(), 2 if half else 4, config["text_config"]
        gelu = "gelu" in str(text.get("hidden_activation") or text.get("hidden_act"))

        def layer_bytes(layer: Layer, rows: Rows) -> tuple[float, float]:
            part = config["vision_config" if rows.kind == "patches" else "text_config"]
            heads = part.get("num_attention_heads") or part["num_heads"]
            if rows.kind == "patches":
                row = 12.0 * layer.width + 4 * layer.wide
            else:
                row = 2 * (layer.width + layer.norms) + (4 + full + gelu) / 2 * layer.wide
                row += 5 * layer.query + 4 * layer.key + 3.0 * layer.gate
            held = rows.total * item * row
            if not layer.state:
                scores = 4 * heads * rows.total * (rows.before + rows.length)
                held += min(scores, device.kept_score_bytes)
                return held, held + min(2 * scores, 4 * device.score_block_bytes)
            # The delta rule pads rows longer than a chunk to whole chunks; in a shorter row its
            # squares are smaller. For rows longer than a segment the backward recomputes the rule
            # segment by segment.
            length, segment = rows.length, device.delta_segment
            plain = delta_bytes(text, length, segment=0)
            kept = plain * (1.0 if full else 0.65)  # without gradients to convolution and norm
            chunks = -(-length // CHUNK) * CHUNK / length if length > CHUNK else length / CHUNK
            solved = (delta_bytes(text, length, segment=length) - plain) * chunks
            held += rows.count * (kept + solved * (length <= segment))
            return held, held + rows.count * solved * segment / length * (length > segment)

        def activations(lengths: Lengths) -> int:
            patches, prompts, completions = lengths
            images = [(patches.count // prompts.count, patches.length)] * prompts.count
            each = completions.count // prompts.count
            rows = prompts.count, prompts.length, each, completions.length
            return estimate(config, item, device, rows, images)

        return Footprint(
            estimate=activations,
            layer=layer_bytes,
            blocks=family(config["model_type"]).image_blocks,
            stream=item,
            recompute_above=options.checkpoint_above,
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
