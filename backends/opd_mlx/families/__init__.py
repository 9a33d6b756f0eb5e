"""The families of vision-language models, one module for each.

mlx-vlm's modules hold the parameters and compute projections, norms and feed-forward; a family
builds the `Layer`s that call them. Everything else in this package is the same code for all
families. `opd_torch.families` is the twin; `opd.prompts.families` encodes the families' prompts.
"""

from __future__ import annotations

from opd.errors import ModelError, nearest
from opd_mlx.families.family import Family
from opd_mlx.families.gemma3 import Gemma3
from opd_mlx.families.idefics3 import Idefics3
from opd_mlx.families.qwen2_5_vl import Qwen25VL
from opd_mlx.families.qwen3_5 import Qwen35
from opd_mlx.families.qwen3_vl import Qwen3VL

FAMILIES: tuple[Family, ...] = (Qwen3VL(), Qwen25VL(), Qwen35(), Gemma3(), Idefics3())

MODEL_TYPES = {name: member for member in FAMILIES for name in member.model_types}


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError, which names the nearest known one."""
    if model_type not in MODEL_TYPES:
        known = nearest(model_type, MODEL_TYPES)
        raise ModelError(
            f"architecture '{model_type}' is not supported by the mlx backend; {known}"
        )
    return MODEL_TYPES[model_type]
