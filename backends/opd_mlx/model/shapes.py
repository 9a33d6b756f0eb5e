"""Names and shapes of a model's parameters, without weights."""

from __future__ import annotations

import json
from functools import cache

from mlx.utils import tree_flatten

from opd.errors import ModelError
from opd.models.shape import Shape
from opd.planner import Config, Shapes
from opd_mlx.families import family
from opd_mlx.model.names import hugging_face


def parameters(config: Config) -> Shapes:
    """The shapes of all parameters, from mlx-vlm's module, whose random parameters are never
    evaluated. Raises ModelError.
    """
    kind = family(config["model_type"])
    try:
        module = kind.build(config, bool(config["tie_word_embeddings"]))
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"config.json cannot be used: {error}") from error
    shapes = {name: value.shape for name, value in dict(tree_flatten(module.parameters())).items()}
    # A convolution's channels are last in MLX and second elsewhere.
    return {
        hugging_face(kind, name): (size[0], size[-1], *size[1:-1]) if len(size) > 2 else size
        for name, size in shapes.items()
    }


@cache
def shape_of(config: str) -> Shape:
    """The shape of a model with this config.json, completed by defaults."""
    stated = json.loads(config)
    return Shape(stated, parameters(stated))
