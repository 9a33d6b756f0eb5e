"""What differs between families of vision-language models once a prompt is encoded; one module per family.

transformers' modules hold the parameters and compute projections, norms and feed-forward; a family says in which order. Everything else
of this package is one code for all families. Twin of `opd_mlx.families`; `opd.prompts.families` is the part of the prompt's encoding.

Legend: N packed rows, D hidden width, H query heads, G key-value heads, d head width, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from opd.errors import ModelError, nearest
from opd.types import Prompt
from opd_torch.attention import Angles, KeysValues
from opd_torch.batch import Reach
from opd_torch.families.gemma3 import Gemma3
from opd_torch.families.idefics3 import Idefics3, SmolVLM
from opd_torch.families.qwen2_5_vl import Qwen25VL
from opd_torch.families.qwen3_5 import Qwen35
from opd_torch.families.qwen3_vl import Qwen3VL


class Family(Protocol):
    """What the one forward of all families asks of each. `model` is a transformers model, `layer` one of `language(model).layers`."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json."""

    @property
    def architecture(self) -> str:
        """The class in transformers."""

    def language(self, model: Any) -> Any:
        """The language trunk: it has `embed_tokens`, `layers`, `norm` and `rotary_emb`."""

    def vision(self, model: Any) -> list[Any]:
        """All modules between pixels and the language trunk, projector included: what is frozen where vision is not trained."""

    def patches(self, prompt: Prompt, model: Any) -> int:
        """Rows of the vision tower that a prompt's images take."""

    def features(self, model: Any, prompts: Sequence[Prompt], again: float) -> list[Tensor]:
        """Image features [S, D] in the order of visual tokens: for the embeddings, then what is added after each of the first layers.

        Empty where no prompt has an image. `again` is the share of the tower's layers, the first, that are computed again in the backward.
        """

    def angles(self, text: Any, positions: Tensor, hidden: Tensor) -> list[Angles]:
        """Rotary `positions` [axes, N] for each layer, as angles in the type of `hidden` [N, D] give them."""

    def mixer(self, layer: Any) -> Any:
        """`opd_torch.attention`, or a module with the same three functions and `Own`, for layers that mix tokens in another way."""

    def reach(self, layer: Any) -> Reach:
        """Which keys an attention layer's rows may attend to."""

    def keys_values(self, layer: Any, normed: Tensor, angles: Angles) -> KeysValues:
        """Keys, with positions rotated in, and values [N, G, d] of normalised rows [N, D]."""

    def queries(self, layer: Any, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """Queries [N, H, d] of normalised rows [N, D], and the gate [N, H * d] of what they will find, if there is one."""

    def finish(self, layer: Any, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's rows from what attention found, [N, H * d] in any cut, and the rows that came in."""


FAMILIES: tuple[Family, ...] = (Qwen3VL(), Qwen25VL(), Qwen35(), Gemma3(), Idefics3(), SmolVLM())

MODEL_TYPES = {name: member for member in FAMILIES for name in member.model_types}


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError, which names the nearest."""
    if model_type not in MODEL_TYPES:
        raise ModelError(f"architecture '{model_type}' is not supported by the torch backend; {nearest(model_type, MODEL_TYPES)}")
    return MODEL_TYPES[model_type]
