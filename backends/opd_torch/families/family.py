"""The protocol of a family of vision-language models.

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
    """What the forward, which is the same for all families, needs from each family. `module` is
    transformers' model, which holds all parameters.
    """

    @property
    def model_types(self) -> tuple[str, ...]:
        """The values of `model_type` in config.json."""

    @property
    def architecture(self) -> str:
        """The name of the class in transformers."""

    @property
    def image_blocks(self) -> bool:
        """Whether the tokens of an image attend to each other in both directions."""

    def text(self, module: Any) -> Trunk:
        """The language trunk."""

    def layers(self, module: Any) -> list[Layer]:
        """The layers of the language trunk."""

    def embed(self, module: Any, tokens: Tensor) -> Tensor:
        """Embeddings [N, D] of `tokens` [N], for the first layer."""

    def angles(self, module: Any, positions: Tensor, hidden: Tensor) -> tuple[Angles, ...]:
        """Rotary factors at `positions` [axes, N], one for each `Layer.rotary`, in at least the
        precision of `hidden`.
        """

    def vision(self, module: Any) -> list[nn.Module]:
        """All modules between pixels and the language trunk, with the projector. They are frozen
        unless vision is trained.
        """

    def patches(self, config: Any, prompt: Prompt) -> int:
        """The number of rows of a prompt's images in the vision tower."""

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float
    ) -> list[Tensor]:
        """Image features [S, D] in the order of visual tokens: first those that replace embeddings,
        then those that are added after each of the first layers.

        The list is empty if no prompt has an image. `recompute` is the share of the tower's layers,
        counted from the first, that the backward recomputes.
        """
