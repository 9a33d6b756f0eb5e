"""The table of views: what a name means, and a view that a program registers."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageOps

from opd.errors import RecipeError
from opd.run.recipe import load
from opd.testing.toy import ToyEncoder
from opd.types import Box, Example
from opd.views import Piece, View, ViewOptions, register, usable, whole
from opd.views.images import student_images, teacher_images, teacher_sizes, views_per_image
from opd.views.view import BUILT_IN, REGISTERED


class Halves(View):
    """The left half of an image, and its inverted right half at twice the size."""

    def counts(self, example, options):
        return [2] * len(example.images)

    def pieces(self, example, number, size, options, max_pixels):
        width, height = size
        right = width // 2, 0, width, height
        enlarged = 2 * (width - width // 2), 2 * height
        return [
            Piece((0, 0, width // 2, height), (width // 2, height)),
            Piece(right, enlarged, ImageOps.invert),
        ]


@pytest.fixture
def own(registers):
    register("halves", Halves())


def example(width=40, height=30, seed=0):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Example("a", (Image.fromarray(picture),), "What?", (Box(3, 4, 9, 12),))


def test_the_names_of_the_product():
    assert sorted(BUILT_IN) == [
        "context",
        "crop",
        "degrade",
        "full",
        "given",
        "marked",
        "several",
        "wrong",
    ]
    assert not REGISTERED


def test_views_that_need_no_evidence():
    """Rows without boxes are read for these alone."""
    assert [name for name in BUILT_IN if not BUILT_IN[name].needs_evidence] == ["degrade", "full"]
    assert Halves.needs_evidence


@pytest.mark.usefixtures("own")
def test_a_registered_view_is_what_the_teacher_sees():
    options = load("tiny", {"view": {"kind": "halves"}}).view
    one = example(41)
    (full,) = student_images(one)
    left, right = teacher_images(one, options)
    assert left.tobytes() == full.crop((0, 0, 20, 30)).tobytes()
    inverted = ImageOps.invert(full).crop((20, 0, 41, 30))
    assert right.tobytes() == inverted.resize((42, 60), Image.Resampling.BICUBIC).tobytes()
    assert teacher_sizes(one, options) == [(20, 30), (42, 60)]
    assert views_per_image(one, options) == [2]


@pytest.mark.usefixtures("own")
def test_a_name_of_the_product_is_not_taken():
    with pytest.raises(ValueError, match="opd has a view 'crop' of its own"):
        register("crop", Halves())
    first = ViewOptions(kind="halves").view
    register("halves", Halves())  # a notebook's cell that runs twice
    assert ViewOptions(kind="halves").view is not first


@pytest.mark.usefixtures("own")
def test_an_unknown_name_is_told_with_the_nearest():
    near = r"view.kind = 'half': no view has this name; did you mean 'halves'\?"
    with pytest.raises(RecipeError, match=near):
        load("tiny", {"view": {"kind": "half"}})
    far = "no view has this name; known: context, crop, degrade, full, given, halves, marked"
    with pytest.raises(RecipeError, match=far):
        load("tiny", {"view": {"kind": "zzz"}})
    with pytest.raises(RecipeError, match=r"view\.kind = 3"):
        load("tiny", {"view": {"kind": 3}})


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("see", [teacher_images, teacher_sizes])
@pytest.mark.parametrize(
    "piece",
    [
        Piece((40, 0, 60, 20), (20, 20)),  # beside the image, which has 40 x 30 pixels
        Piece((-1, 0, 20, 20), (21, 20)),
        Piece((0, 0, 41, 30), (41, 30)),
        Piece((5, 5, 5, 9), (48, 48)),
        Piece((0, 0, 9, 9), (0, 48)),
        Piece((0, 0, 9, 9), (9, -4)),
        Piece((0, 0, 9, 9), (200_000, 200_000)),
    ],
)
def test_a_piece_that_shows_nothing_or_fills_the_memory_is_told(see, piece):
    class Wrong(View):
        def pieces(self, example, number, size, options, max_pixels):
            return [piece]

    register("wrong piece", Wrong())
    with pytest.raises(ValueError, match=r"'wrong piece' gives the region .* of 40 x 30 pixels"):
        see(example(), ViewOptions(kind="wrong piece"))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize(("edit", "size"), [("change", r"\(40, 30\)"), ("after", r"\(9, 9\)")])
def test_a_change_keeps_the_size(edit, size):
    class Shrinks(View):
        def pieces(self, example, number, size, options, max_pixels):
            return [Piece((0, 0, 9, 9), (9, 9), **{edit: lambda image: image.resize((4, 4))})]

    register("shrinks", Shrinks())
    with pytest.raises(ValueError, match=rf"makes an image of \(4, 4\) of one of {size}"):
        teacher_images(example(), ViewOptions(kind="shrinks"))


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("see", [teacher_images, teacher_sizes])
def test_a_view_that_counts_otherwise_is_told(see):
    class Wrong(Halves):
        def pieces(self, example, number, size, options, max_pixels):
            return [whole(size)]

    register("halves", Wrong())
    fault = r"the view 'halves' gives \[1\] pieces of the images, and counts \[2\]"
    with pytest.raises(ValueError, match=fault):
        see(example(), ViewOptions(kind="halves"))
    with pytest.raises(usable.Unusable, match="the row cannot be encoded: the view 'halves' gives"):
        usable.encode(ToyEncoder(), example(), ViewOptions(kind="halves"))
