"""What differs between families of models on torch; one module per family, found by the `model_type` of config.json.

Legend: N packed rows, D hidden width, H query heads, G key-value heads, d head width, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from opd.errors import ModelError, nearest
from opd.types import Prompt
from opd_torch.attention import Angles, KeysValues
from opd_torch.batch import Rule
from opd_torch.families.qwen3_vl import Qwen3VL


class Family(Protocol):
    """What the one forward of all families asks of each. `model` is a transformers model, `layer` one of `text(model).layers`."""

    @property
    def architecture(self) -> str:
        """The class in transformers."""

    @property
    def renamed(self) -> tuple[tuple[str, str], ...]:
        """Beginnings of tensor names in published files, and what transformers calls them; the first that fits counts."""

    def text(self, model: Any) -> Any:
        """The language trunk: it has `embed_tokens`, `layers`, `norm` and `rotary_emb`."""

    def vision(self, model: Any) -> list[Any]:
        """All modules between pixels and the language trunk, projector included: what is frozen where vision is not trained."""

    def patches(self, prompt: Prompt, model: Any) -> int:
        """Rows of the vision tower that a prompt's images take."""

    def features(self, model: Any, prompts: Sequence[Prompt], again: bool) -> list[Tensor]:
        """Image features [S, D] in the order of visual tokens: for the embeddings, then what is added after each of the first layers.

        Empty where no prompt has an image. `again` computes the tower's layers again in the backward.
        """

    def angles(self, text: Any, positions: Tensor, hidden: Tensor) -> list[Angles]:
        """Cosines and sines of rotary `positions` [axes, N] for each layer, in the type of `hidden` [N, D]."""

    def mixer(self, layer: Any) -> Any:
        """`opd_torch.attention`, or a module with the same three functions and `Own`, for layers that mix tokens in another way."""

    def rule(self, layer: Any) -> Rule:
        """Which keys an attention layer's rows may attend to."""

    def keys_values(self, layer: Any, normed: Tensor, angles: Angles) -> KeysValues:
        """Keys, with positions rotated in, and values [N, G, d] of normalised rows [N, D]."""

    def queries(self, layer: Any, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """Queries [N, H, d] of normalised rows [N, D], and the gate [N, H * d] of what they will find, if there is one."""

    def finish(self, layer: Any, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's rows from what attention found, [N, H * d] in any cut, and the rows that came in."""


FAMILIES: dict[str, Family] = {"qwen3_vl": Qwen3VL()}
"""By `model_type`."""


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError, which names the nearest."""
    if model_type not in FAMILIES:
        raise ModelError(f"architecture '{model_type}' is not supported by the torch backend; {nearest(model_type, FAMILIES)}")
    return FAMILIES[model_type]
