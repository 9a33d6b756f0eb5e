"""The view of made-up teacher images: the teacher sees a row's own pictures as they are.

Source: the official data of Vision-OPD (`teacher_images` of Vision-OPD-6K), and `teacher_images` of
ms-swift.
"""

from __future__ import annotations

from collections.abc import Sequence

from opd.errors import DataError
from opd.types import Example, ImageSource
from opd.views.piece import Piece, Size, whole
from opd.views.view import View, ViewOptions


class Given(View):
    """The example's teacher images, whole; boxes are not used."""

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The example's teacher images. Raises DataError if there are none."""
        if not example.teacher_images:
            raise DataError(
                f"example {example.id}: the view '{options.kind}' needs teacher_image, and the row"
                " has none"
            )
        return example.teacher_images

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """1 for each teacher image."""
        return [1] * len(example.teacher_images)

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The whole teacher image `number`."""
        return [whole(size)]
