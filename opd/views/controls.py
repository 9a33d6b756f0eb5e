"""Controls: views from which the student should learn nothing, so that a gain by the evidence crop
can be told from other effects of training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import product

import numpy as np

from opd.types import Box, Example
from opd.views.crop import OnBoxes, crop_counts, crops, region
from opd.views.piece import Piece, Region, Size, whole
from opd.views.view import View, ViewOptions

DRAWS = 32
"""Number of random places that a wrong crop tries before the places that touch a border or an
evidence box."""


class Full(View):
    """The control in which the teacher sees the same images as the student."""

    needs_evidence = False

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The whole image."""
        return [whole(size)]


class WrongCrop(OnBoxes):
    """The control in which the teacher sees crops as large as the evidence crops, but elsewhere in
    the image."""

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
        """The crops of image `number`, each moved away from the evidence."""
        return crops(example, number, size, options, max_pixels, elsewhere)


def elsewhere(right: Region, evidence: Sequence[Box], size: Size, id: str) -> Region:
    """A region of the same size as `right`, in an image of `size`, that does not overlap the
    evidence; if every region does, the candidate that overlaps least.

    The result depends on `id`, which seeds random candidates; further candidates touch a border or
    a box.
    """
    width, height = size
    across, down = right[2] - right[0], right[3] - right[1]
    key = int.from_bytes(hashlib.sha256(id.encode()).digest()[:16], "little")
    drawn = np.random.Generator(np.random.Philox(key=key)).random((DRAWS, 2))
    places = [(int(x * (width - across + 1)), int(y * (height - down + 1))) for x, y in drawn]
    # Any free region stays free when it is moved left and up until it touches a border or a box, so
    # these places include a free one if there is any.
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


def _overlap(a: Region, b: Region) -> int:
    """The area in pixels that two regions share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
