"""The views beside the crop: regions with the numbers written out, and pixels against numpy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from opd.errors import DataError
from opd.prompts.processor import open_encoder
from opd.testing.toy import ToyEncoder
from opd.tiny import MODEL
from opd.types import IMAGE_MARKER, Box, Example
from opd.views import usable
from opd.views.images import student_images, teacher_images, teacher_sizes, views_per_image
from opd.views.marked import frame
from opd.views.piece import Size
from opd.views.questions import teacher_question
from opd.views.usable import Unusable
from opd.views.view import ViewOptions

BARE = {"margin": 0, "min_size": 1}
KINDS = ("crop", "given", "context", "several", "marked", "degrade", "full", "wrong")


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


def example(*boxes: Box, images: tuple[Image.Image, ...] | None = None, **fields) -> Example:
    return Example("a", images or (noise(128, 100),), "What?", boxes, **fields)


def seen(one: Example, **options) -> list[NDArray[np.uint8]]:
    return [pixels(image) for image in teacher_images(one, ViewOptions(**options))]


# Given


def test_given_images_are_seen_as_they_are():
    """Whatever the boxes say."""
    own = noise(30, 20, 1), noise(40, 7, 2)
    one = example(Box(1, 1, 9, 9), teacher_images=own)
    first, second = seen(one, kind="given")
    np.testing.assert_array_equal(first, pixels(own[0]))
    np.testing.assert_array_equal(second, pixels(own[1]))
    assert views_per_image(one, ViewOptions(kind="given")) == [1, 1]


def test_a_row_without_given_images_says_why():
    with pytest.raises(Unusable, match="the view 'given' needs teacher_image, and the row has no"):
        usable.encode(ToyEncoder(), example(Box(1, 1, 9, 9)), ViewOptions(kind="given"))


# Context


@pytest.mark.parametrize(
    ("box", "options", "expected"),
    [
        (Box(50, 40, 70, 50), BARE, (40, 35, 80, 55)),  # half of 20 and of 10 on each side
        (Box(50, 40, 70, 50), {**BARE, "margin": 6}, (34, 29, 86, 61)),
        # The fraction is one of the evidence's longer side, 20 pixels.
        (Box(50, 40, 70, 50), {**BARE, "margin_fraction": 0.5}, (30, 25, 90, 65)),
        (Box(0, 0, 20, 10), BARE, (0, 0, 30, 15)),  # cut off at a corner
        (Box(118, 90, 128, 100), BARE, (113, 85, 128, 100)),
        (Box(10, 10, 120, 90), BARE, (0, 0, 128, 100)),
        (Box(50.5, 40.5, 51, 41), BARE, (50, 40, 52, 42)),  # 50.25 to 51.25
        (Box(14, 50, 114, 51), BARE, (0, 48, 128, 53)),  # a ribbon of 200 x 2, widened to 4
    ],
)
def test_context_is_the_box_grown_to_twice_its_size(box, options, expected):
    one = example(box)
    left, top, right, bottom = expected
    (context,) = seen(one, kind="context", **options)
    np.testing.assert_array_equal(context, pixels(one.images[0])[top:bottom, left:right])


def test_context_is_of_boxes_where_teacher_images_are_given_too():
    one = example(Box(50, 40, 70, 50), teacher_images=(noise(9, 9),))
    assert [image.shape for image in seen(one, kind="context", **BARE)] == [(20, 40, 3)]
    assert teacher_sizes(one, ViewOptions(kind="context", **BARE)) == [(40, 20)]


def test_context_of_each_box():
    one = example(Box(50, 40, 70, 50), Box(10, 10, 20, 20))
    views = seen(one, kind="context", boxes="each", **BARE)
    assert [image.shape for image in views] == [(20, 40, 3), (20, 20, 3)]
    (hull,) = seen(one, kind="context", **BARE)  # 10..70 by 10..50
    assert hull.shape == (70, 100, 3)


@st.composite
def boxed(draw: st.DrawFn, largest: int = 90) -> tuple[Box, Size]:
    """A box that touches an image, often at the border, and the image's size."""
    size = draw(st.integers(1, largest)), draw(st.integers(1, largest))
    sides = []
    for length in size:
        ends = st.sampled_from([-1.0, 0.0, 0.25, length - 0.5, float(length), length + 1.0])
        numbers = ends | st.floats(-2, length + 2, allow_nan=False, width=32)
        low, high = sorted((draw(numbers), draw(numbers)))
        assume(max(low, 0) < min(high, length))
        sides.append((low, high))
    (x0, x1), (y0, y1) = sides
    return Box(x0, y0, x1, y1), size


@given(boxed(20_000), st.floats(0, 40), st.floats(0, 2), st.sampled_from([10**4, 10**6]))
def test_context_holds_the_crop_and_neither_is_enlarged_above_the_bound(
    given_box, margin, fraction, bound
):
    box, size = given_box
    options = ViewOptions(margin=margin, margin_fraction=fraction, min_size=64, enlarge=4)
    one = example(box)
    regions = {}
    for kind in ("crop", "context"):
        (piece,) = options.of(kind).view.pieces(one, 0, size, options, bound)
        regions[kind] = left, top, right, bottom = piece.region
        wide, high = piece.size
        assert wide >= right - left
        assert high >= bottom - top
        if piece.size != (right - left, bottom - top):
            assert wide * high <= bound
    inner, outer = regions["crop"], regions["context"]
    assert outer[0] <= inner[0] <= inner[2] <= outer[2]
    assert outer[1] <= inner[1] <= inner[3] <= outer[3]


# Several


@pytest.mark.parametrize("names", [("full", "crop"), ("full", "context", "crop"), ("crop", "full")])
def test_several_pictures_stand_in_the_place_of_one(names):
    one = example(Box(50, 40, 70, 50))
    views = seen(one, kind="several", pieces=names, **BARE)
    parts = {"full": np.s_[:, :], "crop": np.s_[40:50, 50:70], "context": np.s_[35:55, 40:80]}
    assert len(views) == len(names)
    for view, name in zip(views, names, strict=True):
        np.testing.assert_array_equal(view, pixels(one.images[0])[parts[name]])


def test_an_image_without_a_box_stays_one_picture_and_markers_follow():
    """Also where teacher images are given: these pictures are cut from the boxes."""
    images = noise(60, 40, 1), noise(50, 30, 2), noise(40, 50, 3)
    boxes = Box(5, 5, 15, 15, 0), Box(20, 20, 30, 30, 2), Box(1, 1, 3, 3, 2)
    question = f"{IMAGE_MARKER}One, {IMAGE_MARKER}two and {IMAGE_MARKER}three?"
    one = replace(example(*boxes, images=images, teacher_images=(noise(9, 9),)), question=question)
    options = ViewOptions(kind="several", boxes="each", **BARE)
    views = seen(one, kind="several", boxes="each", **BARE)
    assert views_per_image(one, options) == [2, 1, 3]
    shapes = [(40, 60), (10, 10), (30, 50), (50, 40), (10, 10), (2, 2)]
    assert [view.shape[:2] for view in views] == shapes
    # The encoder repeats the last marker for all pictures that are left.
    first = 2 * IMAGE_MARKER
    expected = f"{first}One, {IMAGE_MARKER}two and {IMAGE_MARKER}three?"
    assert teacher_question(one, options) == expected


# Marked


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        # 5 % of 300 are 15 pixels, and of 60 less than a line.
        (Box(200, 100, 500, 160), (185, 95, 515, 165)),
        (Box(200, 100, 400, 340), (190, 88, 410, 352)),  # the official frame on both axes
        (Box(200.2, 100.6, 400.2, 340.6), (190, 88, 411, 353)),
        (Box(50, 40, 68, 58), (45, 35, 73, 63)),  # a tile of the embedded task: nothing is hidden
        (Box(0, 0, 100, 50), (0, 0, 105, 55)),  # at the border
        (Box(620, 430, 640, 480), (615, 425, 640, 480)),
        (Box(-5, -5, 700, 500), (0, 0, 640, 480)),
    ],
)
def test_the_frame_is_five_pixels_wide_and_red(box, expected):
    one = example(box, images=(noise(640, 480),))
    before = pixels(one.images[0]).copy()
    left, top, right, bottom = expected
    painted = before.copy()
    painted[top:bottom, left:right] = 255, 0, 0
    inner = np.s_[top + 5 : bottom - 5, left + 5 : right - 5]
    painted[inner] = before[inner]
    (view,) = seen(one, kind="marked")
    np.testing.assert_array_equal(view, painted)
    np.testing.assert_array_equal(pixels(one.images[0]), before)  # the student's image has no frame


def test_several_boxes_have_a_frame_each():
    """Whatever `view.boxes` says; an image without a box has none."""
    images = noise(200, 150, 1), noise(80, 60, 2)
    one = example(Box(20, 20, 40, 40), Box(100, 50, 130, 90), images=images)
    first, second = seen(one, kind="marked", boxes="hull")
    painted = pixels(images[0]).copy()
    for left, top, right, bottom in ((15, 15, 45, 45), (95, 45, 135, 95)):
        kept = painted[top + 5 : bottom - 5, left + 5 : right - 5].copy()
        painted[top:bottom, left:right] = 255, 0, 0
        painted[top + 5 : bottom - 5, left + 5 : right - 5] = kept
    np.testing.assert_array_equal(first, painted)
    np.testing.assert_array_equal(second, pixels(images[1]))


@given(boxed(), st.integers(0, 3))
def test_a_frame_hides_nothing_or_the_row_says_why(given_box, seed):
    box, (width, height) = given_box
    one = example(box, images=(noise(width, height, seed),))
    before = pixels(one.images[0]).copy()
    try:
        outer = frame(box, (width, height))
    except DataError:
        with pytest.raises(DataError, match=r"a frame of 5 pixels would hide the box \["):
            seen(one, kind="marked")
        # Only at borders does the line move into the evidence.
        assert box.x0 < 5 or box.y0 < 5 or box.x1 > width - 5 or box.y1 > height - 5
        return
    (view,) = seen(one, kind="marked")
    changed = (view != before).any(axis=2)
    ring = np.zeros_like(changed)
    ring[outer[1] : outer[3], outer[0] : outer[2]] = True
    ring[outer[1] + 5 : outer[3] - 5, outer[0] + 5 : outer[2] - 5] = False
    assert not changed[~ring].any()
    assert (view[ring] == (255, 0, 0)).all()
    visible = ~ring[max(0, int(box.y0)) : int(box.y1) + 1, max(0, int(box.x0)) : int(box.x1) + 1]
    assert visible.any()
    if min(outer[:2]) > 0 and outer[2] < width and outer[3] < height:
        assert visible.all()


@given(boxed(60_000))
def test_frames_of_huge_pictures_hold_the_box(given_box):
    """5 % of the box's side on every side, at least."""
    box, size = given_box
    try:
        left, top, right, bottom = frame(box, size)
    except DataError:
        return
    more = [0.05 * (box.x1 - box.x0), 0.05 * (box.y1 - box.y0)]
    assert left == 0 or left <= box.x0 - more[0]
    assert top == 0 or top <= box.y0 - more[1]
    assert right == size[0] or right >= box.x1 + more[0]
    assert bottom == size[1] or bottom >= box.y1 + more[1]


# All of them


@pytest.mark.parametrize("kind", ["context", "several", "marked", "wrong"])
@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ((), "needs boxes, each in one of the example's images"),
        ((Box(1, 1, 9, 9, 1),), "needs boxes, each in one of the example's images"),
        ((Box(200, 1, 300, 9),), "is empty or outside the image of 128 x 100 pixels"),
    ],
)
def test_a_row_of_which_a_view_cannot_be_made_says_why(kind, boxes, reason):
    """Teacher images are no boxes."""
    one = example(*boxes, teacher_images=(noise(9, 9),))
    with pytest.raises(Unusable, match=reason):
        usable.encode(ToyEncoder(), one, ViewOptions(kind=kind))


@pytest.fixture(scope="module")
def encoder():
    return open_encoder(MODEL)


@pytest.mark.parametrize(
    "options",
    [
        *({"kind": kind} for kind in KINDS),
        {"kind": "several", "pieces": ("full", "context", "crop"), "boxes": "each"},
        {"mixture": {"degrade": 0.5, "marked": 0.5}},
    ],
    ids=str,
)
def test_prompts_of_both_policies_encode_as_long_as_they_were_said_to_be(encoder, options):
    options = ViewOptions(**options).seeded(3)
    images = noise(96, 64, 1), noise(128, 100, 2)
    boxes = Box(30, 20, 50, 40), Box(40, 40, 90, 70, 1), Box(4, 8, 20, 20, 1)
    question = f"{IMAGE_MARKER}Left or {IMAGE_MARKER}right?"
    for number in range(4):
        one = Example(f"{number}", images, question, boxes, teacher_images=images[::-1])
        student, teacher = usable.encode(encoder, one, options)
        assert usable.lengths(encoder, one, options) == (len(student), len(teacher))
        places = [0, *np.cumsum(views_per_image(one, options))]
        assert len({*teacher.visual.image.tolist()}) == places[-1]
        assert len({*student.visual.image.tolist()}) == 2
        again = usable.encode(encoder, one, options)
        assert [prompt.key for prompt in again] == [student.key, teacher.key]
        full = usable.encode_full(encoder, one)
        assert (full.key == student.key) == all(
            ours.tobytes() == theirs.tobytes()
            for ours, theirs in zip(student_images(one, options), images, strict=True)
        )
        assert usable.encode_view(encoder, one, options).key == teacher.key


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "degrade"])
def test_students_see_the_whole_images_without_a_copy(kind):
    one = example(Box(30, 20, 50, 40), teacher_images=(noise(9, 9),))
    (image,) = student_images(one, ViewOptions(kind=kind))
    assert image is one.images[0]
