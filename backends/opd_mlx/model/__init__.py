"""Model folders in Hugging Face layout as mlx-vlm's modules, and back."""

from opd_mlx.model.files import read_tensors, write_model, write_tensors
from opd_mlx.model.load import Model, load_model, not_finite, read_config
from opd_mlx.model.names import Parameters

__all__ = ["Model", "Parameters", "load_model", "not_finite", "read_config", "read_tensors", "write_model", "write_tensors"]
