"""What a family of vision-language models is, once a prompt is encoded.

Legend: N packed rows, D hidden width, S visual tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from opd.types import Prompt
from opd_torch.device import Device
from opd_torch.layers.layer import Angles, Layer
from opd_torch.layers.modules import Trunk


class Family(Protocol):
    """What the one forward of all families asks of each. `module` is transformers' model, and keeps
    all parameters.
    """

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json."""

    @property
    def architecture(self) -> str:
        """The class in transformers."""

    @property
    def image_blocks(self) -> bool:
        """Whether tokens of an image see each other in both directions."""

    def text(self, module: Any) -> Trunk:
        """The language trunk."""

    def layers(self, module: Any) -> list[Layer]:
        """The layers of the language trunk."""

    def embed(self, module: Any, tokens: Tensor) -> Tensor:
        """Embeddings [N, D] of `tokens` [N], as the first layer takes them."""

    def angles(self, module: Any, positions: Tensor, hidden: Tensor) -> tuple[Angles, ...]:
        """Rotary factors at `positions` [axes, N], one for each `Layer.rotary`, in the precision of
        `hidden` or above.
        """

    def vision(self, module: Any) -> list[nn.Module]:
        """All modules between pixels and the language trunk, projector included, frozen where
        vision is not trained.
        """

    def patches(self, config: Any, prompt: Prompt) -> int:
        """Rows of the vision tower that a prompt's images take."""

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float
    ) -> list[Tensor]:
        """Image features [S, D] in the order of visual tokens: for the embeddings, then those added
        after the first layers.

        Empty where no prompt has an image. The first `recompute` share of the tower's layers runs
        again in the backward.
        """
