"""The units of boxes: the range of numbers that each has in a picture, and its pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from opd.data.resizing import smart_resize

Unit: TypeAlias = Literal["pixels", "fraction", "per-mille", "resized", "padded"]
"""Numbers of boxes are:

- pixels: of the image.
- fraction, per-mille: 0 to 1, 0 to 1000 of the image's width and height.
- resized: pixels of the image as the model's image processor resized it (Qwen2.5-VL).
- padded: 0 to 1 of the square that the image is padded to, with the image in its centre (LLaVA).
"""
Size: TypeAlias = tuple[int, int]
Corners: TypeAlias = tuple[float, float, float, float]

PLAIN: tuple[Unit, ...] = ("pixels", "fraction", "per-mille")
"""The units that a message offers, since they need no other fact."""

TOLERANCE = 1.0
"""Pixels by which a box may reach beyond the image, since annotation tools round differently. The
view cuts that part off."""

ROUNDING = 0.5
"""Thousandths by which a box in fractions or per-mille may reach beyond the image: half a unit of
the last digit. That part is cut off."""


@dataclass(frozen=True)
class Frame:
    """The range of a unit in one picture: the picture's sides, by how much a box may reach beyond
    them, and pixels of the picture for one unit."""

    left: float
    top: float
    right: float
    bottom: float
    slack: float
    across: float = 1.0
    down: float = 1.0


def frame_of(unit: Unit, size: Size, resized: Size | None = None) -> Frame:
    """The frame of a picture of `size`. Raises DataError for a picture that the processor cannot
    resize."""
    width, height = size
    if unit == "pixels":
        return Frame(0, 0, width, height, TOLERANCE)
    if unit == "fraction":
        return Frame(0, 0, 1, 1, ROUNDING / 1000, width, height)
    if unit == "per-mille":
        return Frame(0, 0, 1000, 1000, ROUNDING, width / 1000, height / 1000)
    if unit == "resized":
        right, bottom = resized or smart_resize(width, height)
        return Frame(0, 0, right, bottom, TOLERANCE, width / right, height / bottom)
    side = max(size)
    left, top = (side - width) // 2 / side, (side - height) // 2 / side
    return Frame(left, top, left + width / side, top + height / side, ROUNDING / 1000, side, side)


def turn(corners: Corners, size: Size, orientation: int) -> Corners:
    """A box in pixels of a stored image of `size` (width, height), in pixels of the upright
    image. `orientation`: the EXIF orientation, 1..8."""
    width, height = size
    x0, y0, x1, y1 = corners
    if orientation in (2, 3, 7, 8):  # the image is mirrored from left to right
        x0, x1 = width - x1, width - x0
    if orientation in (3, 4, 6, 7):  # the image is mirrored from top to bottom
        y0, y1 = height - y1, height - y0
    return (y0, x0, y1, x1) if orientation >= 5 else (x0, y0, x1, y1)


def clamped(corners: Corners, frame: Frame) -> Corners:
    """A box without what reaches beyond the picture."""
    x0, y0, x1, y1 = corners
    return (
        min(max(x0, frame.left), frame.right),
        min(max(y0, frame.top), frame.bottom),
        min(max(x1, frame.left), frame.right),
        min(max(y1, frame.top), frame.bottom),
    )


def fault_of(corners: Corners, frame: Frame, unit: Unit) -> str:
    """The reason why a box cannot be in `unit`, for a message; empty if it can."""
    x0, y0, x1, y1 = corners
    reaches_out = (
        min(x0 - frame.left, y0 - frame.top) < -frame.slack
        or x1 > frame.right + frame.slack
        or y1 > frame.bottom + frame.slack
    )
    # A box that lies wholly beyond the image is a fault even within the tolerance.
    if (
        reaches_out
        or x0 >= frame.right
        or y0 >= frame.bottom
        or x1 <= frame.left
        or y1 <= frame.top
    ):
        return {
            "pixels": f"is outside the image of {frame.right} x {frame.bottom} pixels",
            "resized": f"is outside the resized image of {frame.right} x {frame.bottom} pixels",
            "padded": "is outside the image in its padded square, which reaches from"
            f" {frame.left:.3g}, {frame.top:.3g} to {frame.right:.3g}, {frame.bottom:.3g}",
        }.get(unit, f"is outside 0..{frame.right}, the range of {unit}")
    if unit in ("pixels", "per-mille", "resized") and max(corners) <= 1:
        return (
            f"is at most one {'thousandth' if unit == 'per-mille' else 'pixel'} in the image's"
            " corner"
        )
    return ""
