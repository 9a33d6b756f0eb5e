"""What the two policies see: the student the whole images, the teacher the evidence enlarged.

Geometry (`region`, `elsewhere`, `enlarged`) is pure and ends in integers; pixel work is in the
functions below it. Regions are (left, top, right, bottom) in pixels of the upright image; right and
bottom are exclusive.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
from PIL.Image import Image, Resampling
from PIL.Image import new as new_image
from pydantic import Field

from opd.data.images import image_size, open_image
from opd.errors import DataError
from opd.options import Options
from opd.types import MAX_PIXELS, Box, Example

Region: TypeAlias = tuple[int, int, int, int]

MAX_ASPECT = 50
"""A crop longer than this many times its width is widened, as far as the image reaches: image
processors refuse ribbons."""

DRAWS = 32
"""Random places tried for a wrong crop before the places that touch a border or an evidence box."""


class ViewOptions(Options):
    """What the teacher sees."""

    kind: Literal["crop", "full", "wrong"] = Field(
        "crop",
        description=(
            "The teacher sees a crop of the evidence; 'full' (the student's images) and 'wrong' (a"
            " crop elsewhere) are controls."
        ),
    )
    boxes: Literal["hull", "each"] = Field(
        "hull",
        description=(
            "Several boxes in one image give one crop around all of them, or one crop each."
        ),
    )
    margin: float = Field(
        6.0, ge=0, le=10_000, description="Pixels of context on every side of the evidence."
    )
    margin_fraction: float = Field(
        0.0,
        ge=0,
        le=10,
        description="More context on every side, as a fraction of the evidence's longer side.",
    )
    min_size: int = Field(
        48,
        ge=1,
        le=1024,
        description="A crop is enlarged until its shorter side has this many pixels.",
    )
    enlarge: float = Field(
        1.0,
        ge=1,
        le=16,
        description="Every crop is enlarged by at least this factor (2 in the official run).",
    )


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around all boxes, which are of one image."""
    return Box(
        min(box.x0 for box in boxes),
        min(box.y0 for box in boxes),
        max(box.x1 for box in boxes),
        max(box.y1 for box in boxes),
        boxes[0].image,
    )


def region(
    box: Box, width: int, height: int, margin: float = 0.0, margin_fraction: float = 0.0
) -> Region:
    """The whole pixels that a box and its margin touch, inside an image of `width` x `height`; at
    least one pixel.

    The part of a box that lies outside the image is cut off. Raises DataError where nothing of the
    box is inside.
    """
    if min(box.x1, width) <= max(box.x0, 0) or min(box.y1, height) <= max(box.y0, 0):
        raise DataError(
            f"box [{box.x0:g}, {box.y0:g}, {box.x1:g}, {box.y1:g}] is empty or outside the image of"
            f" {width} x {height} pixels"
        )
    across, down = box.x1 - box.x0, box.y1 - box.y0
    border = margin + margin_fraction * max(across, down)
    # Margins along the shorter side grow where the crop would be a ribbon.
    longest = max(across, down) + 2 * border
    beside = max(border, (longest / MAX_ASPECT - across) / 2)
    above = max(border, (longest / MAX_ASPECT - down) / 2)
    return (
        max(0, math.floor(box.x0 - beside)),
        max(0, math.floor(box.y0 - above)),
        min(width, math.ceil(box.x1 + beside)),
        min(height, math.ceil(box.y1 + above)),
    )


def elsewhere(right: Region, evidence: Sequence[Box], width: int, height: int, id: str) -> Region:
    """A region of the same size as `right`, with no overlap with the evidence where that is
    possible, else with little.

    Deterministic in `id`; most often one of several places drawn at random.
    """
    across, down = right[2] - right[0], right[3] - right[1]
    key = int.from_bytes(hashlib.sha256(id.encode()).digest()[:16], "little")
    drawn = np.random.Generator(np.random.Philox(key=key)).random((DRAWS, 2))
    places = [(int(x * (width - across + 1)), int(y * (height - down + 1))) for x, y in drawn]
    # A free place slid left and up until it touches a border or a box is still free, so these find
    # one if there is any.
    taken = [region(box, width, height) for box in evidence]
    lefts = {0, width - across, *(box[2] for box in taken)}
    tops = {0, height - down, *(box[3] for box in taken)}
    places += sorted(
        (x, y)
        for x, y in product(lefts, tops)
        if 0 <= x <= width - across and 0 <= y <= height - down
    )
    candidates = [(x, y, x + across, y + down) for x, y in places]
    return min(candidates, key=lambda place: sum(_overlap(place, box) for box in taken))


def enlarged(
    width: int, height: int, min_size: int = 1, enlarge: float = 1.0, max_pixels: int | None = None
) -> tuple[int, int]:
    """The size of a crop for the teacher: `enlarge` times as large, or more where the shorter side
    would stay below `min_size`.

    A crop is not enlarged above `max_pixels`, to which the image processor would bring it back; a
    larger one keeps its size.
    """
    factor = max(enlarge, min_size / min(width, height))
    if max_pixels is not None and (most := math.sqrt(max_pixels / (width * height))) < factor:
        factor = max(1.0, most)
        return max(1, int(width * factor)), max(1, int(height * factor))
    return max(min_size, round(width * factor)), max(min_size, round(height * factor))


def student_images(example: Example) -> list[Image]:
    """The example's images, upright and RGB. Raises DataError where one cannot be read."""
    return [open_image(source, example.max_image_pixels) for source in example.images]


def teacher_images(
    example: Example, options: ViewOptions, max_pixels: int | None = MAX_PIXELS
) -> list[Image]:
    """What the teacher sees, upright and RGB: teacher images as they are given, or crops around the
    example's boxes.

    Crops stand in the place of their image, and an image without a box stays whole, so that "the
    second image" in a question remains the second; `views_per_image` says how many views each image
    gives. No crop is enlarged above `max_pixels`.
    Raises DataError where an example has no evidence.
    """
    if options.kind == "full":
        return student_images(example)
    if options.kind == "crop" and example.teacher_images:
        return [open_image(source, example.max_image_pixels) for source in example.teacher_images]
    _check_evidence(example, options)
    views: list[Image] = []
    for number, source in enumerate(example.images):
        image = open_image(source, example.max_image_pixels)
        boxes = [box for box in example.boxes if box.image == number]
        views += (
            _crops(image, boxes, options, f"{example.id}/{number}", max_pixels)
            if boxes
            else [image]
        )
    return views


def views_per_image(example: Example, options: ViewOptions) -> list[int]:
    """How many of the teacher's images stand in the place of each image of its question."""
    if options.kind == "crop" and example.teacher_images:
        return [1] * len(example.teacher_images)
    if options.kind == "full" or options.boxes == "hull":
        return [1] * len(example.images)
    return [
        max(1, sum(box.image == number for box in example.boxes))
        for number in range(len(example.images))
    ]


def teacher_sizes(
    example: Example,
    options: ViewOptions,
    max_pixels: int | None = MAX_PIXELS,
    size_of: Callable[..., tuple[int, int]] = image_size,
) -> list[tuple[int, int]]:
    """The sizes of `teacher_images`, from the headers of files; `size_of` may be an `image_size`
    that remembers."""
    given = example.teacher_images if options.kind == "crop" else ()
    sizes = [size_of(source, example.max_image_pixels) for source in given or example.images]
    if options.kind == "full" or given:
        return sizes
    _check_evidence(example, options)
    found = []
    for number, size in enumerate(sizes):
        boxes = [box for box in example.boxes if box.image == number]
        places = (
            _places(size, boxes, options, f"{example.id}/{number}", max_pixels)
            if boxes
            else [((0, 0, 0, 0), size)]
        )
        found += [seen for _, seen in places]
    return found


def _check_evidence(example: Example, options: ViewOptions) -> None:
    if not example.boxes or not all(0 <= box.image < len(example.images) for box in example.boxes):
        raise DataError(
            f"example {example.id}: the view '{options.kind}' needs boxes, each in one of the"
            " example's images"
        )


def _places(
    size: tuple[int, int],
    boxes: Sequence[Box],
    options: ViewOptions,
    id: str,
    max_pixels: int | None,
) -> list[tuple[Region, tuple[int, int]]]:
    """The region of each crop of an image, and the size that the crop is brought to."""
    found = []
    for number, box in enumerate([hull(boxes)] if options.boxes == "hull" else boxes):
        place = region(box, *size, options.margin, options.margin_fraction)
        if options.kind == "wrong":
            place = elsewhere(place, boxes, *size, f"{id}/{number}")
        across, down = place[2] - place[0], place[3] - place[1]
        found.append((place, enlarged(across, down, options.min_size, options.enlarge, max_pixels)))
    return found


def _crops(
    image: Image, boxes: Sequence[Box], options: ViewOptions, id: str, max_pixels: int | None
) -> list[Image]:
    crops = []
    for place, size in _places(image.size, boxes, options, id, max_pixels):
        crop = _cut(image, place)
        crops.append(crop if size == crop.size else crop.resize(size, Resampling.BICUBIC))
    return crops


def _cut(image: Image, place: Region) -> Image:
    """The pixels of a region; not by `Image.crop`, which warns of large ones or refuses them."""
    left, top, right, bottom = place
    if (left, top, right, bottom) == (0, 0, *image.size):
        return image
    crop = new_image(image.mode, (right - left, bottom - top))
    crop.paste(image, (-left, -top))
    return crop


def _overlap(a: Region, b: Region) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
