"""What differs between families of vision-language models when a prompt is encoded; one module per
family.

Legend: P prompt tokens. A family is found by the `model_type` of the model's config.json.
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
    """What a prompt's encoding needs to know of a family."""

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json."""

    def named(self, tokenizer: Any) -> Family:
        """The family with the tokens that the model's own processor takes from its tokenizer."""

    @property
    def placeholder(self) -> str:
        """What the chat template writes where an image stands."""

    @property
    def image_token(self) -> str:
        """The token that stands for each visual token of an encoded prompt."""

    @property
    def banned(self) -> tuple[str, ...]:
        """Tokens that never appear in a completion."""

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """The image processor's own options that keep an image between so many pixels; None leaves
        the model's bound.

        Raises ModelError where the family has no such bound.
        """

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """The width * height to which the image processor brings larger images; `sizes` as the
        method of that name returns them."""

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Raises ModelError where the image processor, whose settings stand in `file`, is not that
        of the model's tower.

        `settings`: processor_config.json; `config`: config.json with its defaults.
        """

    def lay_out(
        self,
        processor: Any,
        images: Sequence[Image],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        """The model's forward arguments for `images`, and how each stands in the prompt. Raises
        ValueError as the processor does."""

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """How images of these (width, height) stand in the prompt: the layouts of `lay_out`,
        without pixels."""

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """Rotary positions int32 [axes, P] of an expanded prompt, as the model's own code numbers
        them; `grids` of all tiles."""


FAMILIES: tuple[Family, ...] = (QwenVL(), Gemma3(), Idefics3())


def model_types() -> dict[str, Family]:
    """Every family by the values of `model_type` that it has."""
    return {name: member for member in FAMILIES for name in member.model_types}


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError, which names the supported ones."""
    known = model_types()
    if model_type not in known:
        raise ModelError(
            f"model_type '{model_type}' is not supported; supported: {', '.join(sorted(known))}"
        )
    return known[model_type]
