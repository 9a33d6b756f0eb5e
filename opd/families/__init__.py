"""What differs between families of vision-language models when a prompt is encoded; one module per family.

Legend: P prompt tokens. A family is found by the `model_type` of the model's config.json.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opd.errors import ModelError
from opd.families.qwen3_vl import Qwen3VL
from opd.types import FloatArray, IntArray


class Family(Protocol):
    """What a prompt's encoding needs to know of a family.

    A grid is the (rows, columns) in which the language model sees an image's visual tokens, in reading order.
    """

    @property
    def model_types(self) -> tuple[str, ...]:
        """Values of `model_type` in config.json."""

    @property
    def image_token(self) -> str:
        """The token that stands for an image in the chat template's output, and for each visual token after expansion."""

    @property
    def banned(self) -> tuple[str, ...]:
        """Tokens that never appear in a completion."""

    def sizes(self, processor: Any, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """The image processor's own options that keep an image between so many pixels; None leaves the model's bound."""

    def grids(self, images: Mapping[str, NDArray[np.generic]], processor: Any) -> list[tuple[int, int]]:
        """The grid of each image, from the processor's arrays."""

    def positions(self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]) -> IntArray:
        """Rotary positions int32 [axes, P] of an expanded prompt, as the model's own code numbers them."""

    def boxes(self, grid: tuple[int, int], width: int, height: int) -> FloatArray:
        """What each visual token of an image looks at: [rows * columns, 4], left, top, right, bottom in pixels of the given image."""


FAMILIES: tuple[Family, ...] = (Qwen3VL(),)


def family(model_type: str) -> Family:
    """The family of a `model_type`. Raises ModelError, which names the supported ones."""
    known = {name: member for member in FAMILIES for name in member.model_types}
    if model_type not in known:
        raise ModelError(f"model_type '{model_type}' is not supported; supported: {', '.join(sorted(known))}")
    return known[model_type]
