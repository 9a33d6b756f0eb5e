"""What the trunk needs to know of a family of vision-language models.

Legend: S visual tokens, D text width, B prompts, P prompt tokens.
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
    """A family. `config` is config.json as transformers completes it
    (`opd_mlx.model.read_config`)."""

    model_types: tuple[str, ...]
    """Values of `model_type` in config.json."""

    names: Mapping[str, str]
    """Prefixes of the parameters' names in mlx-vlm's module, and what stands for each in
    transformers' module; the names end alike."""

    raised: tuple[str, ...]
    """Ends of Hugging Face names of vectors to which MLX's files, not Hugging Face's, add 1."""

    vision: tuple[str, ...]
    """Prefixes, in mlx-vlm's module, of what makes image features: the tower and its projector."""

    image_blocks: bool = False
    """Whether tokens of an image see each other in both directions."""

    def build(self, config: Mapping[str, Any], tied: bool) -> Any:
        """mlx-vlm's module, with random parameters that are not computed.

        It has no head of its own if `tied`. Raises ValueError for a text model that the family does
        not compute.
        """

    def text(self, module: Any) -> Trunk:
        """The language trunk."""

    def layers(self, module: Any, config: Mapping[str, Any], device: Device) -> list[Layer]:
        """The layers of the language trunk."""

    def embed(self, module: Any, tokens: mx.array) -> mx.array:
        """Embeddings [..., D] of `tokens`, as the first layer takes them."""

    def angles(self, module: Any, positions: mx.array, dtype: mx.Dtype) -> tuple[KeysValues, ...]:
        """Cosines and sines [rows, 1, E] at `positions` [axes, rows], for each `Layer.rotary`."""

    def features(
        self, module: Any, prompts: Sequence[Prompt], device: Device, recompute: float = 0
    ) -> list[mx.array]:
        """Features [S, D] of all visual tokens in the order of `prompts`.

        The first are for the embeddings, the others for what follows the first layers. Prompts of
        equal key are computed once; without any image the list is empty. `recompute` is the share
        of the tower's layers, the first, that the backward recomputes.
        """

    def published(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """A config.json as published checkpoints have it, which is how mlx-vlm reads it.

        transformers 5 writes some of it elsewhere.
        """

    def patches(self, config: Mapping[str, Any], prompt: Prompt) -> list[tuple[int, int]]:
        """Images of a prompt that go through the vision tower together, and patches of each."""
