"""The size to which Qwen's image processors resize a picture: boxes in pixels of the resized
picture need it."""

from __future__ import annotations

import math

from opd.errors import DataError

FACTOR = 28
"""Sides are multiples of it: 14 pixels of a patch, 2 patches a token."""

MIN_PIXELS = 56 * 56
MAX_PIXELS = 12_845_056
"""The bounds in `preprocessor_config.json` of Qwen2.5-VL: 4 and 16,384 tokens."""

MAX_ASPECT = 200


def smart_resize(
    width: int,
    height: int,
    factor: int = FACTOR,
    min_pixels: int = MIN_PIXELS,
    max_pixels: int = MAX_PIXELS,
) -> tuple[int, int]:
    """(width, height) of the resized picture, each a multiple of `factor`, with the aspect ratio
    about kept, and with an area within the bounds. Raises DataError for an aspect ratio above 200.

    The rule is that of `Qwen2VLImageProcessor` in transformers.
    """
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DataError(
            f"a picture of {width} x {height} pixels is longer than {MAX_ASPECT} times its other"
            " side: Qwen's image processor refuses it, so no box is in its resized pixels"
        )
    # `round` takes halves to the even number, as the processor does.
    across, down = round(width / factor) * factor, round(height / factor) * factor
    if across * down > max_pixels:
        scale = math.sqrt(width * height / max_pixels)
        across = max(factor, math.floor(width / scale / factor) * factor)
        down = max(factor, math.floor(height / scale / factor) * factor)
    elif across * down < min_pixels:
        scale = math.sqrt(min_pixels / (width * height))
        across = math.ceil(width * scale / factor) * factor
        down = math.ceil(height * scale / factor) * factor
    return across, down
