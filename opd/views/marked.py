"""The view of the official training: the whole image with a red frame around the evidence.

Source: the data synthesis of ZwZ (arXiv 2602.11858), from which Vision-OPD-6K comes: each side of
the box moves out by 5 % of the box's width or height, no further than to the border, and a line of
5 pixels is drawn on the inner side of that rectangle. In the official data the student sees this
picture; here the teacher does, in the place of a crop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

from PIL.Image import Image
from PIL.ImageDraw import Draw

from opd.errors import DataError
from opd.types import Box, Example
from opd.views.crop import OnBoxes, region
from opd.views.piece import Piece, Region, Size
from opd.views.view import ViewOptions

GROWTH = 0.05
"""Share of the box's width or height by which each side of the frame lies outside the box."""

LINE = 5
"""Width of the frame's line, in pixels of the image."""

RED = (255, 0, 0)


class Marked(OnBoxes):
    """The whole image with a red frame around each box. Teacher images of an example, and
    `view.boxes`, are not used."""

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The whole image `number`, with a frame around each of its boxes. Raises DataError for a
        box that is outside of the image, or that a frame would hide."""
        frames = tuple(frame(box, size) for box in example.boxes if box.image == number)
        return [Piece((0, 0, *size), size, partial(draw_frames, frames) if frames else None)]


def frame(box: Box, size: Size) -> Region:
    """The outer edge of the frame around a box: the LINE pixels inside of it are red.

    The frame lies outside of the box by GROWTH of the box's sides. If that is less than LINE, it
    lies LINE pixels outside, so that it hides nothing of a box with sides below 100 pixels, which
    the official one does. At the image's border it is moved in. Raises DataError for a box that is
    outside of the image, or that the frame would hide.
    """
    width, height = size
    inside = region(box, width, height)
    beside = max(LINE, GROWTH * (box.x1 - box.x0))
    above = max(LINE, GROWTH * (box.y1 - box.y0))
    left, top = max(0, math.floor(box.x0 - beside)), max(0, math.floor(box.y0 - above))
    right = min(width, math.ceil(box.x1 + beside))
    bottom = min(height, math.ceil(box.y1 + above))
    if max(inside[0], left + LINE) >= min(inside[2], right - LINE) or max(
        inside[1], top + LINE
    ) >= min(inside[3], bottom - LINE):
        raise DataError(
            f"a frame of {LINE} pixels would hide the box [{box.x0:g}, {box.y0:g}, {box.x1:g},"
            f" {box.y1:g}] in an image of {width} x {height} pixels"
        )
    return left, top, right, bottom


def draw_frames(frames: Sequence[Region], image: Image) -> Image:
    """A copy of the image with red frames; `frames` are the outer edges."""
    framed = image.copy()
    canvas = Draw(framed)
    for left, top, right, bottom in frames:
        canvas.rectangle((left, top, right - 1, bottom - 1), outline=RED, width=LINE)
    return framed
