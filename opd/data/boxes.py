"""Reads the evidence boxes of a row, checks them, and converts them to pixels of the upright image.
The unit is never guessed."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, cast, get_args

from opd.data.fields import Row, cut, is_finite, is_number, show, wrong
from opd.errors import DataError, nearest, plural
from opd.types import Box

BoxFormat: TypeAlias = Literal["pixels", "fraction", "per-mille"]
Size: TypeAlias = tuple[int, int]

TOLERANCE = 1.0
"""Pixels by which a box may reach beyond the image, since annotation tools round differently. The
view cuts that part off."""

ROUNDING = 0.5
"""Thousandths by which a box in fractions or per-mille may reach beyond the image: half a unit of
the last digit. That part is cut off."""


def stated_format(row: Row, default: BoxFormat = "pixels") -> BoxFormat:
    """The unit of boxes that a row or the header of a file states, else `default`. Raises
    DataError for an unknown unit."""
    unit = row.get("box_format")
    if unit is None:
        return default
    if unit not in get_args(BoxFormat):
        raise DataError(
            f"field 'box_format': unknown value {show(unit)};"
            f" {nearest(str(unit), get_args(BoxFormat))}"
        )
    return cast(BoxFormat, unit)


def boxes(row: Row, sizes: Sequence[Size], unit: BoxFormat) -> tuple[Box, ...]:
    """The boxes of a row in pixels; empty if the row has none. `sizes`: (width, height) of the
    row's images in pixels. Raises DataError."""
    entries = row.get("boxes")
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise wrong("boxes", entries, "a list of boxes")
    return tuple(_box(entry, sizes, unit) for entry in entries)


def _box(entry: Any, sizes: Sequence[Size], unit: BoxFormat) -> Box:
    """The box of one entry of the field boxes. Raises DataError."""
    if isinstance(entry, dict):
        _check_names(entry)
        image, corners = (0 if entry.get("image") is None else entry["image"]), entry.get("box")
    else:
        image, corners = 0, entry
    if (
        not isinstance(corners, list)
        or len(corners) != 4
        or not all(is_number(corner) for corner in corners)
    ):
        raise wrong("boxes", entry, "a box of four numbers, [left, top, right, bottom]")
    if not isinstance(image, int) or isinstance(image, bool) or not 0 <= image < len(sizes):
        raise DataError(
            f"field 'boxes': image {show(image)} of box {show(corners)} is not among the row's"
            f" {plural(len(sizes), 'image')}, counted from 0"
        )
    if not all(is_finite(corner) for corner in corners):
        raise DataError(f"field 'boxes': box {show(corners)} is not finite")
    x0, y0, x1, y1 = corners
    if x1 <= x0 or y1 <= y0:
        raise DataError(
            f"field 'boxes': box {show(corners)} is empty or inverted; a box is [left, top, right,"
            " bottom]"
        )
    width, height = sizes[image]
    fault = _fault(corners, (width, height), unit)
    if fault:
        fits = [
            f'"{other}"'
            for other in get_args(BoxFormat)
            if other != unit and not _fault(corners, (width, height), other)
        ]
        hint = (
            f'; if its unit is another one, say "box_format": {" or ".join(fits)}' if fits else ""
        )
        raise DataError(f"field 'boxes': box {show(corners)} {fault}{hint}")
    across, down = {
        "pixels": (1.0, 1.0),
        "fraction": (width, height),
        "per-mille": (width / 1000, height / 1000),
    }[unit]
    if unit != "pixels":
        x0, y0, x1, y1 = (
            min(max(corner, 0), 1 if unit == "fraction" else 1000) for corner in corners
        )
    return Box(x0 * across, y0 * down, x1 * across, y1 * down, image)


def _check_names(entry: dict[str, Any]) -> None:
    """Raises DataError for a field of a box that may be a misspelling of image or box."""
    for name in entry:
        if name not in ("image", "box") and get_close_matches(
            name.lower(), ("image", "images", "image_id", "box", "bbox"), n=1, cutoff=0.6
        ):
            meant = "image" if "im" in name.lower() else "box"
            raise DataError(
                f"field 'boxes': a box has no field '{cut(name)}'; did you mean '{meant}'?"
            )


def _fault(corners: Sequence[float], size: Size, unit: BoxFormat) -> str:
    """The reason why a box cannot be in `unit`, for a message; empty if it can."""
    (right, bottom), slack = {
        "pixels": (size, TOLERANCE),
        "fraction": ((1, 1), ROUNDING / 1000),
        "per-mille": ((1000, 1000), ROUNDING),
    }[unit]
    x0, y0, x1, y1 = corners
    reaches_out = min(x0, y0) < -slack or x1 > right + slack or y1 > bottom + slack
    # A box that lies wholly beyond the image is a fault even within the tolerance.
    if reaches_out or x0 >= right or y0 >= bottom or min(x1, y1) <= 0:
        return (
            f"is outside the image of {right} x {bottom} pixels"
            if unit == "pixels"
            else f"is outside 0..{right}, the range of {unit}"
        )
    if unit != "fraction" and max(corners) <= 1:
        return (
            f"is at most one {'pixel' if unit == 'pixels' else 'thousandth'} in the image's corner"
        )
    return ""
