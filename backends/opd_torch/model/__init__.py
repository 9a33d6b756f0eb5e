"""Model folders in Hugging Face layout, as transformers' modules: loading, writing, and the names between."""

from opd_torch.model.adapters import merge
from opd_torch.model.files import read_tensors, write_model, write_tensors
from opd_torch.model.load import DTYPES, copy_model, load_model, master_dtype, not_finite, read_model
from opd_torch.model.names import head_name, trained_parameters

__all__ = [
    "DTYPES",
    "copy_model",
    "head_name",
    "load_model",
    "master_dtype",
    "merge",
    "not_finite",
    "read_model",
    "read_tensors",
    "trained_parameters",
    "write_model",
    "write_tensors",
]
