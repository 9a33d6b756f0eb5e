"""Reads model folders in Hugging Face layout into mlx-vlm's modules, and writes them."""

from opd_mlx.model.files import (
    Checkpoint,
    read_checkpoint,
    write_adapter,
    write_checkpoint,
    write_model,
)
from opd_mlx.model.load import Model, load_model, not_finite, read_config
from opd_mlx.model.names import Parameters

__all__ = [
    "Checkpoint",
    "Model",
    "Parameters",
    "load_model",
    "not_finite",
    "read_checkpoint",
    "read_config",
    "write_adapter",
    "write_checkpoint",
    "write_model",
]
