"""Reads model folders in Hugging Face layout into transformers' modules, and writes them."""

from opd_torch.model.files import export_model, read_checkpoint, write_adapter, write_checkpoint
from opd_torch.model.load import DTYPES, Model, copy_model, load_model, not_finite
from opd_torch.model.quantised import check_four_bits

__all__ = [
    "DTYPES",
    "Model",
    "check_four_bits",
    "copy_model",
    "export_model",
    "load_model",
    "not_finite",
    "read_checkpoint",
    "write_adapter",
    "write_checkpoint",
]
