"""What a view is, and the table of all views, which `opd.views` fills.

A view says what the teacher sees in the place of each image of the question. It names regions and
sizes alone; `opd.views.images` reads the files and cuts. So a prompt's length is known from the
headers of the files, and a view is a few lines that need no picture to be tested.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from PIL.Image import Image
from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from opd.errors import nearest
from opd.options import Options
from opd.types import Example, ImageSource

Region: TypeAlias = tuple[int, int, int, int]
"""(left, top, right, bottom) in pixels of the upright image; right and bottom are exclusive."""

Size: TypeAlias = tuple[int, int]
"""(width, height) in pixels."""


@dataclass(frozen=True)
class Piece:
    """One image that the teacher sees: a `region` of an image, resized to `size`.

    `change` edits the whole upright RGB image before the region is cut, and keeps its size.
    """

    region: Region
    size: Size
    change: Callable[[Image], Image] | None = None


def whole(size: Size) -> Piece:
    """An image as it is."""
    return Piece((0, 0, *size), size)


class View(ABC):
    """What the teacher sees of an example. A view keeps no state: threads share it."""

    @abstractmethod
    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """What stands in the place of image `number` (from 0), which has `size`, in its order.

        `max_pixels`: the pixels to which the image processor brings a larger piece back; None
        where it has no bound. Raises DataError where the image gives no such view.
        """

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The images that the pieces are cut from: the example's. Raises DataError where the
        example lacks what the view needs."""
        return example.images

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """The number of pieces in the place of each image, known before a file is opened."""
        return [1] * len(example.images)


BUILT_IN: dict[str, View] = {}
OWN: dict[str, View] = {}


def register(name: str, view: View) -> None:
    """Lets `view.kind = name` of a recipe mean `view`, in this process; an earlier registration of
    the name is replaced.

    A run records the name alone, so a process that resumes it has to register the view as well.
    Raises ValueError where opd itself has a view of that name.
    """
    if name in BUILT_IN:
        raise ValueError(f"opd has a view '{name}' of its own; take another name")
    OWN[name] = view


def _known(kind: str) -> str:
    """The name of a view. Raises PydanticCustomError where there is none of that name."""
    if kind not in BUILT_IN and kind not in OWN:
        known = nearest(kind, [*BUILT_IN, *OWN])
        raise PydanticCustomError("view", "no view has this name; {known}", {"known": known})
    return kind


class ViewOptions(Options):
    """What the teacher sees."""

    kind: Annotated[str, AfterValidator(_known)] = Field(
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

    @property
    def view(self) -> View:
        """The view of that kind."""
        return BUILT_IN[self.kind] if self.kind in BUILT_IN else OWN[self.kind]
