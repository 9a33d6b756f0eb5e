"""The view of Vision-OPD (arXiv 2605.18740): the teacher sees enlarged crops around the evidence.
Also the same crops with more context around them.

The functions here compute regions in whole pixels and never read an image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

from opd.errors import DataError
from opd.types import Box, Example, ImageSource
from opd.views.piece import Piece, Region, Size, whole
from opd.views.view import View, ViewOptions

MAX_ASPECT = 50
"""Largest aspect ratio of a crop, since image processors refuse longer ones. A crop above it is
widened as far as the image reaches."""

CONTEXT = 2.0
"""Width and height of the part of an image that `Context` shows, in widths and heights of the
evidence's box, before margins."""

Move: TypeAlias = Callable[[Region, Sequence[Box], Size, str], Region]
"""Moves a crop: maps the crop's region, all boxes of the image, the image's size and a name of the
crop to another region."""


class Crop(View):
    """Crops around the boxes; if an example has teacher images, those.

    Crops take the place of their image, and an image without a box stays whole, so that "the second
    image" in a question remains the second.
    """

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The example's teacher images if there are any, else the images. Raises DataError if a box
        is missing."""
        if example.teacher_images:
            return example.teacher_images
        check_evidence(example, options)
        return example.images

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """1 for each teacher image; without teacher images, the number of crops of each image."""
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
        """The whole teacher image `number`; without teacher images, the crops of image
        `number`."""
        if example.teacher_images:
            return [whole(size)]
        return crops(example, number, size, options, max_pixels)


class OnBoxes(View):
    """A view of boxes alone: teacher images of an example are not used."""

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The example's images. Raises DataError if a box is missing."""
        check_evidence(example, options)
        return example.images


class Context(OnBoxes):
    """Crops with context: the box is first grown about its centre to CONTEXT times its width and
    height, then gets the margins of a crop, and is cut off at the image's border.

    So the region always holds that of `Crop`. Source: a picture beside the crop in the views of
    several pictures (`opd.views.several`).
    """

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """The number of crops of each image, as in `Crop`."""
        return crop_counts(example, options)

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The crops of image `number`, each with context."""
        return crops(example, number, size, options, max_pixels, times=CONTEXT)


def has_evidence(example: Example) -> bool:
    """Whether an example has boxes or teacher images."""
    return bool(example.boxes or example.teacher_images)


def check_evidence(example: Example, options: ViewOptions) -> None:
    """Raises DataError if an example has no boxes, or a box in an image that does not exist."""
    if not example.boxes or not all(0 <= box.image < len(example.images) for box in example.boxes):
        raise DataError(
            f"example {example.id}: the view '{options.kind}' needs boxes, each in one of the"
            " example's images"
        )


def crop_counts(example: Example, options: ViewOptions) -> list[int]:
    """The number of crops of each image: 1, or, with options.boxes = "each", one for each box and 1
    for an image without a box."""
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
    times: float = 1.0,
) -> list[Piece]:
    """The crops around the boxes of image `number`, which has `size`, each moved by `move`; the
    whole image if it has no box. `times`: as for `region`. Raises DataError for a box outside of
    the image."""
    boxes = [box for box in example.boxes if box.image == number]
    if not boxes:
        return [whole(size)]
    pieces = []
    for place, box in enumerate([hull(boxes)] if options.boxes == "hull" else boxes):
        cut = region(box, *size, options.margin, options.margin_fraction, times)
        if move:
            cut = move(cut, boxes, size, f"{example.id}/{number}/{place}")
        across, down = cut[2] - cut[0], cut[3] - cut[1]
        large = enlarged(across, down, options.min_size, options.enlarge, max_pixels)
        pieces.append(Piece(cut, large))
    return pieces


def hull(boxes: Sequence[Box]) -> Box:
    """The smallest box around `boxes`, which lie in the same image."""
    return Box(
        min(box.x0 for box in boxes),
        min(box.y0 for box in boxes),
        max(box.x1 for box in boxes),
        max(box.y1 for box in boxes),
        boxes[0].image,
    )


def region(
    box: Box,
    width: int,
    height: int,
    margin: float = 0.0,
    margin_fraction: float = 0.0,
    times: float = 1.0,
) -> Region:
    """The whole pixels that a box with a margin covers in an image of `width` x `height`; at least
    one pixel.

    `margin` in pixels; `margin_fraction`: a further margin as a fraction of the box's longer side;
    `times`: the box is first grown about its centre to so many times its width and height.
    The part of a box outside the image is cut off. Raises DataError if the whole box is outside.
    """
    if min(box.x1, width) <= max(box.x0, 0) or min(box.y1, height) <= max(box.y0, 0):
        raise DataError(
            f"box [{box.x0:g}, {box.y0:g}, {box.x1:g}, {box.y1:g}] is empty or outside the image of"
            f" {width} x {height} pixels"
        )
    across, down = box.x1 - box.x0, box.y1 - box.y0
    border = margin + margin_fraction * max(across, down)
    beside, above = ((times - 1) / 2 * side + border for side in (across, down))
    # If the crop would be longer than MAX_ASPECT allows, the margin of the shorter side grows.
    longest = max(across + 2 * beside, down + 2 * above)
    beside = max(beside, (longest / MAX_ASPECT - across) / 2)
    above = max(above, (longest / MAX_ASPECT - down) / 2)
    return (
        max(0, math.floor(box.x0 - beside)),
        max(0, math.floor(box.y0 - above)),
        min(width, math.ceil(box.x1 + beside)),
        min(height, math.ceil(box.y1 + above)),
    )


def enlarged(
    width: int, height: int, min_size: int = 1, enlarge: float = 1.0, max_pixels: int | None = None
) -> tuple[int, int]:
    """The (width, height) to which a crop is enlarged: `enlarge` times as large, or more if the
    shorter side would stay below `min_size` pixels.

    A crop is not enlarged above `max_pixels`, since the image processor would scale it down again;
    a crop that is already larger keeps its size.
    """
    factor = max(enlarge, min_size / min(width, height))
    if max_pixels is not None and (most := math.sqrt(max_pixels / (width * height))) < factor:
        factor = max(1.0, most)
        return max(1, int(width * factor)), max(1, int(height * factor))
    return max(min_size, round(width * factor)), max(min_size, round(height * factor))
