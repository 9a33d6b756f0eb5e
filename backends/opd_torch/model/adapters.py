"""Injects low-rank adapters as peft's layers into transformers' modules, and merges adapters into
weights. `opd.models.adapters` has what both backends share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opd.models import adapters, peft_files
from opd.types import FloatArray, ModelOptions
from opd_torch.model.names import hugging_face


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """The shape (out, in) of every linear layer, by Hugging Face name."""
    return {
        name: (layer.out_features, layer.in_features)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
    }


def add_adapters(model: Any, options: ModelOptions, dtype: torch.dtype) -> None:
    """Adds adapters of type `dtype` with initial values, and freezes everything else."""
    from peft import LoraConfig, inject_adapter_in_model

    assert options.adapters is not None
    values = peft_files.initial_adapters(options, linear_layers(model))
    config = LoraConfig(
        r=options.adapters.rank,
        lora_alpha=options.adapters.alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=adapters.adapted_layers(values),
        lora_dropout=0.0,
        bias="none",
    )
    model.requires_grad_(False)
    inject_adapter_in_model(config, model)
    for layer in model.modules():
        if hasattr(layer, "cast_input_dtype_enabled"):
            # peft would cast inputs to the adapter's float32; autocast casts to the compute dtype.
            layer.cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = torch.from_numpy(values[hugging_face(name)]).to(
                parameter.device, dtype
            )


def merge(model: nn.Module, tensors: Mapping[str, FloatArray], scale: float) -> None:
    """Adds scale * B A of an adapter's `tensors` to the weights of a plain model."""
    weights: dict[str, Tensor] = dict(model.named_parameters())
    with torch.no_grad():
        for name, change in adapters.merged_updates(tensors, scale):
            weights[name].add_(torch.from_numpy(change).to(weights[name].device))
