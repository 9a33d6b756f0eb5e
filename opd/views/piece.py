"""One image that a policy sees, as a region of an image and a size, without its pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from PIL.Image import Image

Region: TypeAlias = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the upright image; right and bottom are exclusive."""

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Piece:
    """One image that a policy sees: a `region` of an image, resized to `size`.

    `change` edits the whole upright RGB image before the region is cut, `after` the piece in its
    final size; both keep the size.
    """

    region: Region
    size: Size
    change: Callable[[Image], Image] | None = None
    after: Callable[[Image], Image] | None = None


def whole(size: Size) -> Piece:
    """The whole image, at the same size."""
    return Piece((0, 0, *size), size)
