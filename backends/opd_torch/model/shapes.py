"""Names and shapes of a model's parameters, without weights."""

from __future__ import annotations

import torch
import transformers

from opd.planner import Config, Shapes
from opd_torch.families import family


def parameters(config: Config) -> Shapes:
    """The shapes of all parameters, from transformers' model on the meta device."""
    settings = transformers.AutoConfig.for_model(**config)
    settings.vision_config.vision_use_head = False  # no forward uses the head
    with torch.device("meta"):
        model = getattr(transformers, family(settings.model_type).architecture)(settings)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}
