"""What `opd plan` asks of MLX: shapes without weights, a rough footprint, and this machine."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
from mlx.utils import tree_flatten

from opd.memory import host_memory
from opd.planner import Config, Footprint, Machine, Shapes
from opd.types import ModelOptions
from opd_mlx.families import family
from opd_mlx.footprint import delta_bytes
from opd_mlx.forward import CHECKPOINT_ABOVE
from opd_mlx.gradient import TOGETHER
from opd_mlx.kernels.scores import KEPT_BYTES
from opd_mlx.model.names import hugging_face
from opd_mlx.objective import CHUNK_BYTES
from opd_mlx.sampling import PREFILL_TOKENS

BLOCK_BYTES = 2**20
"""Bytes of a block of the head stage on a processor."""


class MlxPlanner:
    """`opd.planner.Planner` for a Mac, and for MLX on a processor."""

    def parameters(self, config: Config) -> Shapes:
        """Shapes of mlx-vlm's module, whose random parameters are never computed."""
        of = family(config["model_type"])
        module = of.build(config, bool(config["tie_word_embeddings"]))
        named = {hugging_face(of, name): one.shape for name, one in tree_flatten(module.parameters())}
        # Channels of kernels come last in MLX, and second elsewhere.
        return {
            name: (size[0], size[-1], *size[1:-1]) if len(size) > 2 else tuple(size)
            for name, size in named.items()
        }

    def footprint(
        self, options: ModelOptions, config: Config, largest: int, prompt: int, here: bool
    ) -> Footprint:
        """Of a row, in the type of computation: norms, sums, and what products and activations take."""
        full, half = options.adapters is None, options.dtype == "bfloat16"
        gpu, item, text = not here or _gpu(), 2 if half else 4, config["text_config"]
        row, recurrence = (3.0 * item, (1.55 + 0.25 * full) * item), (0.0, 0.0)
        if "linear_num_value_heads" in text:
            share = 1.0 if full else 0.85  # its own weights take no gradient
            recurrence = share * delta_bytes(text, prompt) / prompt, share * delta_bytes(text, 1)
        return Footprint(
            prompt=row,
            completion=row,
            patch=(3.0 * item, 2.2 * item),
            recurrence=recurrence,
            copies="never",
            score=4,
            scores_most=KEPT_BYTES,
            stream=item,
            recompute_above=CHECKPOINT_ABOVE,
            backward=1.0,
            forward=0.6,
            frozen=item,
            cast=item * (half and full),
            cast_tables=True,
            head_copy=4 * (half and not full),
            head=(3.0, 5.0, CHUNK_BYTES, CHUNK_BYTES if gpu else BLOCK_BYTES),
            apply=3 * max(TOGETHER, 4 * largest),
            keeps_tokens=0 if half else PREFILL_TOKENS,
        )

    def machine(self) -> Machine:
        """The Mac's GPU, or the processor."""
        stream = mx.gpu if _gpu() else mx.cpu

        def product(side: int, dtype: str) -> Callable[[], object]:
            matrix = mx.ones((side, side), dtype=getattr(mx, dtype))
            return lambda: mx.eval(mx.matmul(matrix, matrix, stream=stream))

        def copy(size: int) -> Callable[[], object]:
            source = mx.ones(size // 4)
            return lambda: mx.eval(mx.add(source, 1.0, stream=stream))

        if not _gpu():
            return Machine("CPU", host_memory(), 0.9, product)
        about = mx.device_info()
        memory = float(about["memory_size"])
        usable = about.get("max_recommended_working_set_size", 0.75 * memory) / memory
        return Machine(str(about["device_name"]), memory, usable, product, copy)


def _gpu() -> bool:
    return bool(mx.default_device() == mx.Device(mx.gpu))


MLX = MlxPlanner()
