"""The interface of views, and the table of all views, which `opd.views` fills.

A view says what the teacher sees in the place of each image of the question, and, in training, what
the student sees. It only computes regions and sizes; `opd.views.images` reads and cuts the images.
So the length of a prompt follows from the headers of the files, and a view can be tested without
images.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from opd.errors import RecipeError, nearest
from opd.options import Options
from opd.types import Example, ImageSource
from opd.views.piece import Piece, Size, whole

ROUNDING = 1e-6
"""Largest difference between 1 and the sum of a mixture's shares."""


class View(ABC):
    """Computes what the policies see of an example. Threads share a view, so it must not keep
    state. The same example and options give the same pieces every time."""

    needs_evidence: bool = True
    """Whether every row needs boxes or teacher images; if not, rows without them are read too."""

    changes_student: bool = False
    """Whether `student_piece` gives anything but the whole image."""

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

    def student_piece(
        self, example: Example, number: int, size: Size, options: ViewOptions
    ) -> Piece:
        """What the student sees in training in the place of image `number` of the example, which
        has `size`: by default the whole image. Where a model is measured, the student sees the
        whole images, whatever this says."""
        return whole(size)


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


def named(kind: str) -> View:
    """The view with this name. Raises RecipeError."""
    view = BUILT_IN.get(kind) or REGISTERED.get(kind)
    if view is None:
        raise RecipeError(f"no view is called '{kind}'; {nearest(kind, [*BUILT_IN, *REGISTERED])}")
    return view


def draws(seed: int, name: str) -> np.random.Generator:
    """The random numbers of `name`, which names what they decide and for which example: a pure
    function of `seed` and `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode("utf-8", "surrogatepass")).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


class Mixture(View):
    """Shows each row in one of several views, each view to its share of the rows.

    The view of a row is drawn by the row's id and the run's seed alone, so the row has the same
    view in every epoch, in every process, and after a resume.
    """

    def __init__(self, shares: Mapping[str, float]) -> None:
        """`shares`: the share of each view by name; they sum to 1."""
        self.shares = dict(shares)
        self.needs_evidence = all(named(kind).needs_evidence for kind in shares)
        self.changes_student = any(named(kind).changes_student for kind in shares)

    def kind(self, example: Example, options: ViewOptions) -> str:
        """The name of the view that is drawn for an example."""
        drawn = draws(options.seed, f"mixture/{example.id}").random()
        ends = accumulate(self.shares.values())
        below = (kind for kind, end in zip(self.shares, ends, strict=True) if drawn < end)
        return next(below, [*self.shares][-1])  # rounding can leave the last end below 1

    def pieces(
        self,
        example: Example,
        number: int,
        size: Size,
        options: ViewOptions,
        max_pixels: int | None,
    ) -> list[Piece]:
        """The pieces of the drawn view."""
        view, options = self._drawn(example, options)
        return view.pieces(example, number, size, options, max_pixels)

    def sources(self, example: Example, options: ViewOptions) -> Sequence[ImageSource]:
        """The sources of the drawn view. Raises DataError if the example lacks what that view
        needs; the row then has no other view."""
        view, options = self._drawn(example, options)
        return view.sources(example, options)

    def counts(self, example: Example, options: ViewOptions) -> list[int]:
        """The counts of the drawn view."""
        view, options = self._drawn(example, options)
        return view.counts(example, options)

    def student_piece(
        self, example: Example, number: int, size: Size, options: ViewOptions
    ) -> Piece:
        """The student's piece of the drawn view."""
        view, options = self._drawn(example, options)
        return view.student_piece(example, number, size, options)

    def _drawn(self, example: Example, options: ViewOptions) -> tuple[View, ViewOptions]:
        """The drawn view, and the options with its name."""
        options = options.of(self.kind(example, options))
        return options.view, options


def _known(kind: str) -> str:
    """Returns `kind`. Raises PydanticCustomError if no view has this name."""
    if kind not in BUILT_IN and kind not in REGISTERED:
        known = nearest(kind, [*BUILT_IN, *REGISTERED])
        raise PydanticCustomError("view", "no view has this name; {known}", {"known": known})
    return kind


def _table(value: Any) -> Any:
    """Returns `value`. Raises PydanticCustomError if it is no table of shares."""
    if not isinstance(value, Mapping):
        raise PydanticCustomError("mixture", "write it as {crop = 0.7, context = 0.3}")
    return value


def _whole_shares(shares: dict[str, float]) -> dict[str, float]:
    """Returns `shares`. Raises PydanticCustomError if they do not sum to 1."""
    total = math.fsum(shares.values())
    if shares and abs(total - 1) > ROUNDING:
        raise PydanticCustomError(
            "mixture", "the shares sum to {total}, not to 1", {"total": f"{total:.7g}"}
        )
    return shares


def _different(kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Returns `kinds`. Raises PydanticCustomError if a picture is named twice."""
    if len(set(kinds)) < len(kinds):
        raise PydanticCustomError("pieces", "a picture is named twice")
    return kinds


Kind: TypeAlias = Annotated[str, AfterValidator(_known)]
"""The name of a view."""


class ViewOptions(Options):
    """The images that the teacher sees, and the student in training (docs/views.md)."""

    kind: Kind = Field(
        "crop",
        description=(
            "The teacher sees a crop of the evidence; or 'given', 'context', 'several', 'marked',"
            " 'degrade' (docs/views.md); 'full' (the student's images) and 'wrong' (a crop"
            " elsewhere) are controls."
        ),
    )
    mixture: Annotated[
        dict[Kind, Annotated[float, Field(gt=0, le=1)]],
        BeforeValidator(_table),
        AfterValidator(_whole_shares),
    ] = Field(
        {},
        description=(
            "Instead of `kind`, several views with their shares, such as {crop = 0.7, context ="
            " 0.3}: each row is shown in one of them, drawn by its id and run.seed. The shares sum"
            " to 1."
        ),
    )
    pieces: Annotated[
        tuple[Literal["full", "context", "crop", "marked"], ...], AfterValidator(_different)
    ] = Field(
        ("full", "crop"),
        min_length=2,
        description=(
            "The pictures of 'several' in the place of an image, in order: of full, context, crop"
            " and marked."
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

    _seed: int = PrivateAttr(0)

    @model_validator(mode="after")
    def _one_choice(self) -> ViewOptions:
        """Raises ValueError if both a kind and a mixture are chosen."""
        if self.mixture and self.kind != "crop":  # the default, which every config.toml holds
            raise ValueError(
                f"kind = '{self.kind}' beside a mixture; set view.kind=crop to use the mixture, or"
                " view.mixture={} to use the kind"
            )
        return self

    @property
    def view(self) -> View:
        """The view of these options."""
        return Mixture(self.mixture) if self.mixture else named(self.kind)

    @property
    def title(self) -> str:
        """The view in words: "crop", or "crop 0.7, context 0.3" for a mixture."""
        shares = (f"{kind} {share:g}" for kind, share in self.mixture.items())
        return ", ".join(shares) or self.kind

    @property
    def seed(self) -> int:
        """The seed of what a view draws, set by `seeded`; 0 otherwise."""
        return self._seed

    def seeded(self, seed: int) -> ViewOptions:
        """The same options with the seed of a run, on which mixtures and degraded images depend."""
        options = self.model_copy()
        options._seed = seed
        return options

    def of(self, kind: str) -> ViewOptions:
        """The same options for the view `kind`, without a mixture."""
        return self.model_copy(update={"kind": kind, "mixture": {}})
