"""Reads model folders in Hugging Face layout into transformers' modules, and writes them."""

from opd_torch.model.files import export_model, read_checkpoint, write_adapter, write_checkpoint
from opd_torch.model.load import DTYPES, Model, copy_model, load_model, not_finite

__all__ = [
    "DTYPES",
    "Model",
    "copy_model",
    "export_model",
    "load_model",
    "not_finite",
    "read_checkpoint",
    "write_adapter",
    "write_checkpoint",
]
