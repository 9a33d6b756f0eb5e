"""Locates the evidence in the tile of the picture on which the model is most certain of its own
answer.

The teacher of Vision-OPD answers better on the evidence than on the full image; here its certainty
looks for the evidence. Tiles of several scales overlap by half, so that evidence of up to half a
tile is whole in one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opd.errors import DataError
from opd.locate.locator import NOTHING, Located, Looker, certainty, picture_sizes
from opd.types import Box, Example, Prompt
from opd.views.images import student_images
from opd.views.piece import Size
from opd.views.usable import Unusable, encode_full, encode_view

PARTS = (2, 3, 4)
"""Scales: a tile of scale k has 1 / k of the picture's width and height, and there are
(2 k - 1)^2 of them: 83 tiles in all."""


class Tiles:
    """The most certain tile. The confidence is the model's probability per token of its own answer
    on the tile, the geometric mean. Where the full image is more certain, nothing is found."""

    name = "tiles"
    rows = 1

    def check(self, looker: Looker) -> None:
        """Any model can answer."""

    def prompts(self, looker: Looker, example: Example) -> list[Prompt]:
        """The full image, then every tile as the teacher sees a crop."""
        try:
            images = student_images(example)  # decoded once for all tiles
        except DataError as error:
            raise Unusable(str(error)) from error
        # Without the teacher's question, since certainties are compared on one question.
        opened = replace(example, images=tuple(images), teacher_images=(), teacher_question=None)
        view = looker.view.of("crop")
        return [
            encode_full(looker.encoder, opened, looker.limit),
            *(
                encode_view(looker.encoder, replace(opened, boxes=(tile,)), view, looker.limit)
                for tile in tiles([image.size for image in images])
            ),
        ]

    def locate(
        self, looker: Looker, examples: Sequence[Example], prompts: Sequence[Sequence[Prompt]]
    ) -> list[Located]:
        """The most certain tile of every example."""
        answers = iter(looker.answers([prompt for some in prompts for prompt in some]))
        located = []
        for some in prompts:
            certain = [certainty(next(answers)) for _ in some]
            place = max(range(len(certain)), key=certain.__getitem__)
            if place == 0:
                located.append(NOTHING)
                continue
            box = tiles(picture_sizes(some[0]))[place - 1]
            located.append(Located((box,), certain[place]))
        return located


def tiles(sizes: Sequence[Size], parts: Sequence[int] = PARTS) -> list[Box]:
    """The tiles of images of `sizes` (width, height), by image, scale, row and column."""
    return [
        Box(
            column * width / (2 * part),
            row * height / (2 * part),
            (column + 2) * width / (2 * part),
            (row + 2) * height / (2 * part),
            number,
        )
        for number, (width, height) in enumerate(sizes)
        for part in parts
        for row in range(2 * part - 1)
        for column in range(2 * part - 1)
    ]
