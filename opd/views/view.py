"""The interface of views, and the table of all views, which `opd.views` fills.

A view says what the teacher sees in the place of each image of the question. It only computes
regions and sizes; `opd.views.images` reads and cuts the images. So the length of a prompt follows
from the headers of the files, and a view can be tested without images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, TypeAlias

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
    """The whole image, at the same size."""
    return Piece((0, 0, *size), size)


class View(ABC):
    """Computes what the teacher sees of an example. Threads share a view, so it must not keep
    state."""

    needs_evidence: ClassVar[bool] = True
    """Whether every row needs boxes or teacher images; if not, rows without them are read too."""

    @abstractmethod
    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The pieces, in order, that take the place of image `number` (from 0) of `sources`, which
        has `size`.

        `max_pixels`: the image processor scales larger pieces down to this many pixels; None: it
        has no bound. Raises DataError if the view cannot be made of this image.
        """

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The images from which the pieces are cut: by default the example's images. Raises
        DataError if the example lacks what the view needs."""
        return example.images

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """The number of pieces in the place of each image of `sources`, without opening files."""
        return [1] * len(example.images)


BUILT_IN: dict[str, View] = {}
"""The views of opd, by name."""

REGISTERED: dict[str, View] = {}
"""The views that programs have registered, by name."""


def register(name: str, view: View) -> None:
    """Makes `view` available in this process as `view.kind = name` of a recipe. A second
    registration of the same name replaces the first.

    A run records only the name, so a process that resumes the run has to register the view too.
    Raises ValueError for the name of a view of opd.
    """
    if name in BUILT_IN:
        raise ValueError(f"opd has a view '{name}' of its own; take another name")
    REGISTERED[name] = view


def _known(kind: str) -> str:
    """Returns `kind`. Raises PydanticCustomError if no view has this name."""
    if kind not in BUILT_IN and kind not in REGISTERED:
        known = nearest(kind, [*BUILT_IN, *REGISTERED])
        raise PydanticCustomError("view", "no view has this name; {known}", {"known": known})
    return kind


class ViewOptions(Options):
    """The images that the teacher sees."""

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
        """The view that `kind` names."""
        return BUILT_IN[self.kind] if self.kind in BUILT_IN else REGISTERED[self.kind]
