"""Reads the evidence boxes of a row, checks them, and converts them to pixels of the upright image.
The unit is never guessed.

A value holds one box, [left, top, right, bottom], or a list of them; {"image": 1, "box": [...]} is
a box in another image than the first. A box, or the list, may be written as a text: "[1, 2, 3, 4]",
"1, 2, 3, 4" or "(1, 2), (3, 4)".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, TypeAlias, cast, get_args

from opd.data.fields import Row, cut, is_finite, is_number, show, wrong
from opd.data.frames import PLAIN, Corners, Size, Unit, clamped, fault_of, frame_of, turn
from opd.errors import DataError, nearest, plural
from opd.types import Box

BoxFormat: TypeAlias = Literal[
    "pixels",
    "fraction",
    "per-mille",
    "resized",
    "padded",
    "pixels-xywh",
    "fraction-xywh",
    "per-mille-xywh",
    "resized-xywh",
    "padded-xywh",
]
"""A unit (`opd.data.frames`), and "-xywh" where boxes are [left, top, width, height]."""
BoxImage: TypeAlias = Literal["upright", "stored"]
"""The image that boxes are drawn on: upright, after its EXIF orientation, as viewers show it; or
stored, before it, as some tools read it."""
XYWH = "-xywh"

UNSETTLED = "resized or per-mille"
"""The unit of boxes that a format writes in one of two ways (`bbox_2d`): a person says which."""

LONGEST = 100_000
"""Characters up to which a text is read as a list of boxes."""


@dataclass(frozen=True)
class Drawn:
    """The way in which the boxes of a row were drawn.

    `image`: the picture that they were drawn on; "" if nobody says, which is upright unless the
    row's `box_size` shows that it is stored. `ours`: whether a message may ask to change the row
    itself, and not an option alone.
    """

    format: BoxFormat = "pixels"
    image: BoxImage | Literal[""] = ""
    ours: bool = True

    @property
    def unit(self) -> Unit:
        """The unit without the order of the numbers."""
        return cast(Unit, self.format.removesuffix(XYWH))

    @property
    def has_extent(self) -> bool:
        """Whether boxes are [left, top, width, height]."""
        return self.format.endswith(XYWH)


def stated_format(row: Row, default: BoxFormat = "pixels", said: str = "") -> BoxFormat:
    """The unit of boxes that a row or the header of a file states, else the one that a person has
    `said` for all rows, else `default`. Raises DataError for an unknown unit, for two that
    contradict each other, and where only a person can say it."""
    unit = row.get("box_format")
    if unit == UNSETTLED and not said:
        raise DataError(
            "field 'boxes': 'bbox_2d' has two meanings; say data.box_format=resized (pixels of the"
            " resized picture, as Qwen2.5-VL writes) or data.box_format=per-mille (0..1000, as"
            " Qwen3-VL and Qwen3.5 write)"
        )
    if unit is None or unit == UNSETTLED:
        return cast(BoxFormat, said or default)
    if unit not in get_args(BoxFormat):
        raise DataError(
            f"field 'box_format': unknown value {show(unit)};"
            f" {nearest(str(unit), get_args(BoxFormat))}"
        )
    if said and said != unit:
        raise DataError(f"field 'box_format': the row says {unit}, and data.box_format says {said}")
    return cast(BoxFormat, unit)


def stated_image(row: Row, said: str = "") -> BoxImage | Literal[""]:
    """The image, upright or stored, that the boxes of a row are drawn on, from the row or as a
    person has `said`; "" if neither says it. Raises DataError."""
    image = row.get("box_image") or said
    if image not in ("", *get_args(BoxImage)):
        raise wrong("box_image", image, '"upright" or "stored"')
    return cast('BoxImage | Literal[""]', image)


def boxes(
    row: Row,
    sizes: Sequence[Size],
    drawn: Drawn,
    orientation: Callable[[int], int] = lambda _: 1,
    remark: Callable[[str], None] = lambda _: None,
) -> tuple[Box, ...]:
    """The boxes of a row in pixels of the upright images; empty if the row has none.

    `sizes`: upright (width, height) of the row's images in pixels. `orientation` gives the EXIF
    orientation, 1..8, of an image by its number; it is asked only where it matters. `remark` hears
    of what a person should know. Raises DataError.
    """
    entries = listed("boxes", row.get("boxes"))
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise wrong("boxes", entries, "a list of boxes")
    remarks: dict[str, None] = {}
    reader = _Reader(row, sizes, drawn, orientation, remarks.setdefault)
    found = tuple(map(reader.box, _several(entries)))
    for each in remarks:
        remark(each)
    return found


def listed(field: str, value: Any) -> Any:
    """The value of a field that may be written as a text, which is parsed as JSON and never
    evaluated. Raises DataError for a text that is no list."""
    if not isinstance(value, str):
        return value
    text = value.strip().replace("(", "[").replace(")", "]") if len(value) <= LONGEST else ""
    for whole in (text, f"[{text}]"):
        try:
            parsed = json.loads(whole)
        except (ValueError, RecursionError):
            continue
        if isinstance(parsed, list) and (parsed or whole == text):
            return _joined(parsed)
    raise wrong(field, value, "a list of numbers")


def _joined(values: list[Any]) -> list[Any]:
    """[[x0, y0], [x1, y1]], the two corners of "(x0, y0), (x1, y1)", as one box; else `values`."""
    pairs = len(values) == 2 and all(isinstance(pair, list) and len(pair) == 2 for pair in values)
    return [*values[0], *values[1]] if pairs else values


def _several(entries: list[Any]) -> list[Any]:
    """A list of boxes, whether one box is given or several. Raises DataError for several boxes as
    one flat list."""
    if not entries or not all(is_number(entry) for entry in entries):
        return entries
    if len(entries) > 4 and len(entries) % 4 == 0:
        raise DataError(
            f"field 'boxes': {show(entries)} are {len(entries)} numbers in one list; write each box"
            " as a list of its own"
        )
    return [entries]


@dataclass(frozen=True)
class _Reader:
    """Reads the boxes of one row."""

    row: Row
    sizes: Sequence[Size]
    drawn: Drawn
    orientation: Callable[[int], int]
    remark: Callable[[str], object]

    def box(self, entry: Any) -> Box:
        """The box of one entry of the field boxes. Raises DataError."""
        if isinstance(entry, dict):
            _check_names(entry)
            image, given = (0 if entry.get("image") is None else entry["image"]), entry.get("box")
        else:
            image, given = 0, entry
        given = listed("boxes", given)
        names = "left, top, width, height" if self.drawn.has_extent else "left, top, right, bottom"
        numbers = isinstance(given, list) and all(is_number(number) for number in given)
        if not numbers or len(given) != 4:
            point = "; a point has no extent" if numbers and len(given) == 2 else ""
            raise wrong("boxes", entry, f"a box of four numbers, [{names}]{point}")
        if (
            not isinstance(image, int)
            or isinstance(image, bool)
            or not (0 <= image < len(self.sizes))
        ):
            raise DataError(
                f"field 'boxes': image {show(image)} of box {show(given)} is not among the row's"
                f" {plural(len(self.sizes), 'image')}, counted from 0"
            )
        if not all(is_finite(number) for number in given):
            raise DataError(f"field 'boxes': box {show(given)} is not finite")
        return self._placed(given, image)

    def _placed(self, given: list[float], image: int) -> Box:
        """The box of four numbers in an image."""
        corners = _corners(given, self.drawn.has_extent)
        upright, stated = self.sizes[image], self._stated_size(image)
        turned = self.orientation(image) if self._is_stored(stated, image) else 1
        size = upright[::-1] if turned >= 5 else upright
        unit = self.drawn.unit
        resized = stated if unit == "resized" else None
        frame = frame_of(unit, size, resized)
        if corners[2] <= corners[0] or corners[3] <= corners[1]:
            raise DataError(f"field 'boxes': box {show(given)} is empty or inverted{self._order()}")
        if fault := fault_of(corners, frame, unit):
            raise DataError(f"field 'boxes': box {show(given)} {fault}{self._units(given, size)}")
        if unit != "pixels":
            corners = clamped(corners, frame)
        x0, y0, x1, y1 = (
            (corner - start) * scale
            for corner, start, scale in zip(
                corners, (frame.left, frame.top) * 2, (frame.across, frame.down) * 2, strict=True
            )
        )
        return Box(*turn((x0, y0, x1, y1), size, turned), image)

    def _stated_size(self, image: int) -> Size | None:
        """The row's `box_size` of an image; None if it has none. Raises DataError."""
        given = listed("box_size", self.row.get("box_size"))
        if given is None:
            return None
        if isinstance(given, list) and given and all(isinstance(one, list) for one in given):
            given = given[image] if image < len(given) else None
        whole = isinstance(given, list) and len(given) == 2
        if not whole or not all(is_finite(side) and side >= 1 for side in given):
            raise wrong("box_size", given, "[width, height] in pixels")
        return int(given[0]), int(given[1])

    def _is_stored(self, stated: Size | None, image: int) -> bool:
        """Whether boxes are drawn on the stored pixels: a person or the row says so, or the size
        that the row gives its picture is the stored one. Raises DataError for boxes in pixels of a
        size that is neither."""
        if self.drawn.image:
            return self.drawn.image == "stored"
        upright = self.sizes[image]
        if stated is None or stated == upright or self.drawn.unit == "resized":
            return False
        if stated == upright[::-1] and self.orientation(image) >= 5:
            self.remark(STORED)
            return True
        if self.drawn.unit != "pixels":
            return False
        resized = self._option(f"resized{XYWH if self.drawn.has_extent else ''}")
        raise DataError(
            f"field 'box_size': {stated[0]} x {stated[1]} is not the size of the picture, which is"
            f" {upright[0]} x {upright[1]}; if it was resized since, say {resized}"
        )

    def _order(self) -> str:
        """A clause about the order of a box's numbers, and what to say for another one."""
        if self.drawn.has_extent:
            return "; a box is [left, top, width, height]"
        other = f"{self.drawn.unit}{XYWH}"
        return (
            "; a box is [left, top, right, bottom]; if it is [left, top, width, height], say"
            f" {self._option(other)}"
        )

    def _units(self, given: list[float], size: Size) -> str:
        """A clause that names the other units which fit a box; empty if none does."""
        corners = _corners(given, self.drawn.has_extent)
        end = XYWH if self.drawn.has_extent else ""
        fits = [
            f'"{unit}{end}"' if self.drawn.ours else f"{unit}{end}"
            for unit in PLAIN
            if unit != self.drawn.unit and not fault_of(corners, frame_of(unit, size), unit)
        ]
        if not fits:
            return ""
        say = '"box_format": ' if self.drawn.ours else "data.box_format="
        return f"; if its unit is another one, say {say}{' or '.join(fits)}"

    def _option(self, value: str) -> str:
        return f'"box_format": "{value}"' if self.drawn.ours else f"data.box_format={value}"


STORED = (
    "the size that a row gives its picture is that before EXIF rotation, so its boxes are read as"
    " drawn on the stored pixels; for upright ones say data.box_image=upright"
)
"""The remark about a row whose `box_size` shows that its boxes are drawn on the stored pixels."""


def _corners(given: Sequence[float], has_extent: bool) -> Corners:
    """(left, top, right, bottom) of the four numbers of a box."""
    x, y, right, bottom = given
    return (x, y, x + right, y + bottom) if has_extent else (x, y, right, bottom)


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
