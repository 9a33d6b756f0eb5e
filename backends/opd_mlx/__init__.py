"""The MLX backend: Metal GPU on a Mac, CPU on Linux. Twin of `opd_torch`, file by file; nothing here needs torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd.types import ModelOptions
    from opd_mlx.backend import MlxBackend

__all__ = ["load"]


def load(options: ModelOptions) -> MlxBackend:
    """Loads the model in `options.path` on MLX's default device."""
    from opd_mlx.backend import MlxBackend

    return MlxBackend(options)
