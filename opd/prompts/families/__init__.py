"""How each family of vision-language models encodes images in a prompt; one module per family.

`model_type` in config.json names the family. Legend: P prompt tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from opd.errors import ModelError
from opd.prompts.families.gemma3 import Gemma3
from opd.prompts.families.idefics3 import Idefics3
from opd.prompts.families.layout import Layout
from opd.prompts.families.qwen_vl import QwenVL
from opd.types import IntArray

__all__ = ["FAMILIES", "Family", "Layout", "family", "model_types"]


class Family(Protocol):
    """A family's part of encoding a prompt."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json that belong to the family."""

    def named(self, tokenizer: Any) -> Family:
        """The same family with the special tokens that `tokenizer` names."""

    @property
    def placeholder(self) -> str:
        """The text that the chat template writes in the place of an image."""

    @property
    def image_token(self) -> str:
        """The token that stands for each visual token of an encoded prompt."""

    @property
    def banned(self) -> tuple[str, ...]:
        """Tokens that never appear in a completion."""

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """Options of the image processor that bound the pixels of a resized image; None keeps the
        model's bound.

        Raises ModelError if the family cannot keep the bound.
        """

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """Largest width * height of a resized image; `sizes` is a result of `sizes()`."""

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Raises ModelError if the settings of the image processor, which `file` holds, do not fit
        the model's vision tower.

        `settings`: processor_config.json; `config`: config.json completed by defaults.
        """

    def lay_out(
        self,
        processor: Any,
        images: Sequence[Image],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        """Arguments of the model's forward for `images`, by name, and the layout of each image.
        Raises ValueError if the processor does."""

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """The layouts that `lay_out` returns, from the (width, height) of the images alone."""

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """Rotary positions int32 [axes, P] of `tokens` [P], as the model's own code computes them;
        `grids`: (rows, columns) of the visual tokens of every tile, in order."""


FAMILIES: tuple[Family, ...] = (QwenVL(), Gemma3(), Idefics3())


def model_types() -> dict[str, Family]:
    """Families by `model_type`."""
    return {name: member for member in FAMILIES for name in member.model_types}


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError, which lists the supported values."""
    known = model_types()
    if model_type not in known:
        raise ModelError(
            f"model_type '{model_type}' is not supported; supported: {', '.join(sorted(known))}"
        )
    return known[model_type]
