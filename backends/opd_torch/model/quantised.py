"""4-bit base models for adapters, by bitsandbytes (nf4; QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

import torch
import transformers

from opd.errors import BackendError
from opd.models import adapters

NEEDED = ("bitsandbytes", "accelerate")
"""The packages that 4-bit weights need."""


def check_four_bits(device: torch.device) -> None:
    """Raises BackendError if the device or the installed packages do not support 4-bit weights."""
    if device.type != "cuda":
        raise BackendError(
            "model.tune = 'qlora' needs a CUDA GPU on torch; "
            "use --backend mlx, or --set model.tune=lora"
        )
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise BackendError(
            f"model.tune = 'qlora' needs {' and '.join(missing)} on torch: "
            f"pip install {' '.join(missing)}"
        )


def four_bits(layers: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The arguments with which `from_pretrained` loads the linear layers of the language model in 4
    bits.

    `layers` are the names of all linear layers, `dtype` is the type of computation.
    """
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[
            "lm_head",
            *(name for name in layers if adapters.part_of_model(name) != "language"),
        ],
    )
    return {"quantization_config": config, "device_map": {"": device}}
