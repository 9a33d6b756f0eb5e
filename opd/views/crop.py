"""The teacher's view of Vision-OPD: crops around the evidence, enlarged.

All geometry is pure and ends in whole pixels (`opd.views.view.Region`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from opd.errors import DataError
from opd.types import Box, Example, ImageSource
from opd.views.view import Piece, Region, Size, View, ViewOptions, whole

MAX_ASPECT = 50
"""A crop longer than this many times its width is widened, as far as the image reaches: image
processors refuse ribbons."""

Move: TypeAlias = Callable[[Region, Sequence[Box], Size, str], Region]
"""From a crop's region, all boxes of the image, its size and a name of the crop to another
region."""


class Crop(View):
    """Crops around the boxes, or teacher images as an example gives them.

    Crops stand in the place of their image, and an image without a box stays whole, so that "the
    second image" in a question remains the second.
    """

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The teacher images where the example gives some, else its images."""
        if example.teacher_images:
            return example.teacher_images
        check_evidence(example, options)
        return example.images

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """One for each teacher image that is given, else the crops of each image."""
        if example.teacher_images:
            return [1] * len(example.teacher_images)
        return crop_counts(example, options)

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """A teacher image as it is, or the crops of an image."""
        if example.teacher_images:
            return [whole(size)]
        return crops(example, number, size, options, max_pixels)


def check_evidence(example: Example, options: ViewOptions) -> None:
    """Raises DataError where an example has no boxes, or one that is in none of the images."""
    if not example.boxes or not all(0 <= box.image < len(example.images) for box in example.boxes):
        raise DataError(
            f"example {example.id}: the view '{options.kind}' needs boxes, each in one of the"
            " example's images"
        )


def crop_counts(example: Example, options: ViewOptions) -> list[int]:
    """The number of crops of each image, by its boxes; 1 where it has none."""
    if options.boxes == "hull":
        return [1] * len(example.images)
    return [
        max(1, sum(box.image == number for box in example.boxes))
        for number in range(len(example.images))
    ]


def crops(
    example: Example,
    number: int,
    size: Size,
    options: ViewOptions,
    max_pixels: int | None,
    move: Move | None = None,
) -> list[Piece]:
    """The crops around the boxes of image `number`, each moved by `move`; the whole image where it
    has no box."""
    boxes = [box for box in example.boxes if box.image == number]
    if not boxes:
        return [whole(size)]
    pieces = []
    for place, box in enumerate([hull(boxes)] if options.boxes == "hull" else boxes):
        cut = region(box, *size, options.margin, options.margin_fraction)
        if move:
            cut = move(cut, boxes, size, f"{example.id}/{number}/{place}")
        across, down = cut[2] - cut[0], cut[3] - cut[1]
        large = enlarged(across, down, options.min_size, options.enlarge, max_pixels)
        pieces.append(Piece(cut, large))
    return pieces


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
