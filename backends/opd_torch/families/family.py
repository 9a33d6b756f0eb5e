"""What the one forward of all families asks of each.

Legend: N packed rows, D hidden width, H query heads, G key-value heads, d head width, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from opd.types import Prompt
from opd_torch.batch import Reach
from opd_torch.layers.attention import Angles, KeysValues


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
        """`opd_torch.layers.attention`, or a module with the same three functions and `Own`, for layers that mix tokens in another way."""

    def reach(self, layer: Any) -> Reach:
        """Which keys an attention layer's rows may attend to."""

    def keys_values(self, layer: Any, normed: Tensor, angles: Angles) -> KeysValues:
        """Keys, with positions rotated in, and values [N, G, d] of normalised rows [N, D]."""

    def queries(self, layer: Any, normed: Tensor, angles: Angles) -> tuple[Tensor, Tensor | None]:
        """Queries [N, H, d] of normalised rows [N, D], and the gate [N, H * d] of what they will find, if there is one."""

    def finish(self, layer: Any, hidden: Tensor, mixed: Tensor, gate: Tensor | None) -> Tensor:
        """The layer's rows from what attention found, [N, H * d] in any cut, and the rows that came in."""
