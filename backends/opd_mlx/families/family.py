"""The protocol of a family of vision-language models.

Legend: S visual tokens of all prompts, D width of the language trunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import mlx.core as mx

from opd.types import Prompt
from opd_mlx.device import Device
from opd_mlx.layers.layer import KeysValues, Layer
from opd_mlx.layers.modules import Trunk


class Family(Protocol):
    """What the forward, which is the same for all families, needs from each family.

    `module` is mlx-vlm's model, and `config` is config.json, completed by transformers
    (`opd_mlx.model.read_config`).
    """

    model_types: tuple[str, ...]
    """The values of `model_type` in config.json."""

    names: Mapping[str, str]
    """The prefixes of parameters' names in transformers' module, by the prefixes in mlx-vlm's
    module. The rest of a name is equal in both."""

    raised: tuple[str, ...]
    """The endings of Hugging Face names of norms whose weights mlx-vlm stores with 1 added."""

    vision: tuple[str, ...]
    """The prefixes in mlx-vlm's module of the vision tower and the projector."""

    image_blocks: bool = False
    """Whether the tokens of an image attend to each other in both directions."""

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """Builds mlx-vlm's module, with random parameters that are not evaluated.

        If `tied`, the module has no head. Raises ValueError for a configuration that the family
        does not support.
        """

    def text(self, module: Any) -> Trunk:
        """The language trunk."""

    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        """The layers of the language trunk."""

    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        """Embeddings [..., D] of `tokens`, for the first layer."""

    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        """Cosines and sines [rows, 1, E] at `positions` [axes, rows], for each `Layer.rotary`."""

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float = 0
    ) -> list[mx.array]:
        """Image features [S, D] in the order of visual tokens: first those that replace embeddings,
        then those that are added after each of the first layers.

        Prompts of equal key are computed once. The list is empty if no prompt has an image.
        `recompute` is the share of the tower's layers, counted from the first, that the backward
        recomputes.
        """

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Converts a config.json to the form of published checkpoints, which mlx-vlm reads;
        transformers 5 moves some keys.
        """

    def patches(self, config: Mapping[str, Any], prompt: Prompt) -> list[tuple[int, int]]:
        """Pairs (images, patches of each) of the prompt's images that attend together."""
