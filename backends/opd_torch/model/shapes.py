"""Names and shapes of a model's parameters, without weights."""

from __future__ import annotations

import json
from functools import cache

import torch
import transformers

from opd.models.shape import Shape
from opd.planner import Config, Shapes
from opd_torch.families import family


def parameters(config: Config) -> Shapes:
    """The shapes of all parameters, from transformers' model on the meta device."""
    settings = transformers.AutoConfig.for_model(**config)
    settings.vision_config.vision_use_head = False  # no forward uses the head
    with torch.device("meta"):
        model = getattr(transformers, family(settings.model_type).architecture)(settings)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


@cache
def shape_of(config: str) -> Shape:
    """The shape of a model with this config.json, completed by defaults."""
    stated = json.loads(config)
    return Shape(stated, parameters(stated))
