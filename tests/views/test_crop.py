"""What teacher and student see: geometry with the numbers written out, and the pixels that come of
it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from opd.errors import DataError
from opd.types import Box, Example
from opd.views.controls import elsewhere
from opd.views.crop import MAX_ASPECT, enlarged, hull, region
from opd.views.images import student_images, teacher_images
from opd.views.piece import Region
from opd.views.view import ViewOptions

TINY = ViewOptions(margin=6, min_size=48)
BARE = ViewOptions(margin=0, min_size=1)


def gradient(width: int, height: int) -> Image.Image:
    """Red is the column, green the row: every pixel says where it is."""
    row, column = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([column, row, np.zeros_like(row)], axis=2).astype(np.uint8))


def pixels(image: Image.Image) -> NDArray[np.uint8]:
    assert image.mode == "RGB"
    return np.asarray(image)


def example(
    *boxes: Box, images: tuple[Image.Image, ...] | None = None, **fields: object
) -> Example:
    images = images or (gradient(128, 100),)
    return Example("example-1", images, "What?", boxes, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("box", "margin", "fraction", "expected"),
    [
        (Box(50, 40, 68, 58), 6, 0, (44, 34, 74, 64)),  # a tile of the embedded task
        (Box(50, 40, 68, 58), 0, 0, (50, 40, 68, 58)),
        (Box(50.2, 40.9, 67.1, 58), 0, 0, (50, 40, 68, 58)),  # every pixel that the box touches
        (Box(50, 40, 70, 50), 0, 0.5, (40, 30, 80, 60)),  # half of the longer side, on every side
        (Box(50, 40, 70, 50), 5, 0.5, (35, 25, 85, 65)),
        (Box(0, 0, 18, 18), 6, 0, (0, 0, 24, 24)),  # clipped at a corner
        (Box(110, 82, 128, 100), 6, 0, (104, 76, 128, 100)),
        (Box(60, 50, 61, 51), 0, 0, (60, 50, 61, 51)),  # one pixel
        (Box(60.4, 50.4, 60.6, 50.6), 0, 0, (60, 50, 61, 51)),  # less than one
        (Box(-5, -5, 300, 300), 6, 0, (0, 0, 128, 100)),  # larger than the image
        (Box(-5, 20, 10, 40), 0, 0, (0, 20, 10, 40)),
        # a ribbon, widened to a fiftieth of its length, 2 pixels
        (Box(10, 50, 110, 51), 0, 0, (10, 49, 110, 52)),
        (Box(10, 0, 110, 1), 0, 0, (10, 0, 110, 2)),
        (Box(50, 0, 51, 100), 0, 0, (49, 0, 52, 100)),
    ],
)
def test_region(box: Box, margin: float, fraction: float, expected: Region) -> None:
    assert region(box, 128, 100, margin, fraction) == expected


@pytest.mark.parametrize(
    "box",
    [
        Box(128, 0, 140, 10),
        Box(-9, 0, 0, 10),
        Box(0, 100, 5, 101),
        Box(5, 5, 5, 9),
        Box(9, 5, 5, 9),
    ],
    ids=str,
)
def test_a_box_without_a_pixel_inside_is_an_error(box: Box) -> None:
    with pytest.raises(DataError, match=r"is empty or outside the image of 128 x 100 pixels"):
        region(box, 128, 100, 6)


@pytest.mark.parametrize(
    ("size", "min_size", "enlarge", "expected"),
    [
        ((30, 30), 48, 1, (48, 48)),
        ((30, 60), 48, 1, (48, 96)),
        ((60, 30), 48, 1, (96, 48)),
        ((30, 30), 48, 2, (60, 60)),
        ((100, 50), 48, 1, (100, 50)),
        ((100, 51), 1, 2, (200, 102)),
        ((31, 33), 1, 1.5, (46, 50)),
        ((1, 1), 48, 2, (48, 48)),
        ((7, 100), 48, 1, (48, 686)),
    ],
)
def test_enlarged(
    size: tuple[int, int], min_size: int, enlarge: float, expected: tuple[int, int]
) -> None:
    assert enlarged(*size, min_size, enlarge) == expected


@st.composite
def boxed(draw: st.DrawFn) -> tuple[Box, int, int]:
    width, height = draw(st.integers(1, 300)), draw(st.integers(1, 300))
    numbers = st.floats(-1, 301, allow_nan=False, width=32)
    x0, x1 = sorted((draw(numbers), draw(numbers)))
    y0, y1 = sorted((draw(numbers), draw(numbers)))
    return Box(x0, y0, x1, y1), width, height


@given(boxed(), st.floats(0, 50), st.floats(0, 3), st.integers(1, 200), st.floats(1, 4))
def test_a_crop_is_inside_contains_the_evidence_and_is_large_enough(
    given_box: tuple[Box, int, int], margin: float, fraction: float, min_size: int, enlarge: float
) -> None:
    box, width, height = given_box
    inside = (max(box.x0, 0), max(box.y0, 0), min(box.x1, width), min(box.y1, height))
    if inside[0] >= inside[2] or inside[1] >= inside[3]:
        with pytest.raises(DataError):
            region(box, width, height, margin, fraction)
        return
    left, top, right, bottom = region(box, width, height, margin, fraction)
    assert 0 <= left <= inside[0]
    assert 0 <= top <= inside[1]
    assert inside[2] <= right <= width
    assert inside[3] <= bottom <= height
    # The margin is there wherever the image reaches so far.
    assert left == 0 or left <= box.x0 - margin
    assert bottom == height or bottom >= box.y1 + margin
    across, down = right - left, bottom - top
    # Clipping can only shorten, so a side that does not span the image is wide enough.
    assert across * MAX_ASPECT >= down or left == 0 or right == width
    wide, high = enlarged(across, down, min_size, enlarge)
    assert min(wide, high) >= min_size
    assert wide >= round(across * enlarge)
    factor = max(enlarge, min_size / min(across, down))
    assert (wide / across, high / down) == (
        pytest.approx(factor, abs=0.51 / across),
        pytest.approx(factor, abs=0.51 / down),
    )


@given(boxed(), st.integers(0, 50), st.text(max_size=5))
def test_a_wrong_crop_has_the_same_size_and_avoids_the_evidence_where_that_is_possible(
    given_box: tuple[Box, int, int], margin: int, id: str
) -> None:
    box, width, height = given_box
    try:
        right, taken = region(box, width, height, margin), region(box, width, height)
    except DataError:
        return
    wrong = elsewhere(right, [box], (width, height), id)
    across, down = right[2] - right[0], right[3] - right[1]
    assert (wrong[2] - wrong[0], wrong[3] - wrong[1]) == (across, down)
    assert wrong[0] >= 0
    assert wrong[1] >= 0
    assert wrong[2] <= width
    assert wrong[3] <= height
    free = max(taken[0], width - taken[2]) >= across or max(taken[1], height - taken[3]) >= down
    apart = (
        wrong[2] <= taken[0] or wrong[0] >= taken[2] or wrong[3] <= taken[1] or wrong[1] >= taken[3]
    )
    assert apart == free
    assert elsewhere(right, [box], (width, height), id) == wrong


def test_a_wrong_crop_finds_the_only_free_place_between_several_boxes() -> None:
    boxes = [Box(0, 0, 40, 100), Box(50, 0, 128, 100)]
    assert elsewhere((0, 0, 10, 100), boxes, (128, 100), "any") == (40, 0, 50, 100)


def test_wrong_crops_of_different_examples_differ() -> None:
    places = {
        elsewhere((0, 0, 10, 10), [Box(0, 0, 10, 10)], (128, 100), f"example-{number}")
        for number in range(20)
    }
    assert len(places) == 20


def test_hull() -> None:
    assert hull([Box(5, 20, 10, 30, 1), Box(2, 25, 7, 40, 1)]) == Box(2, 20, 10, 40, 1)


def test_the_tile_of_the_embedded_task_becomes_48_pixels() -> None:
    (crop,) = teacher_images(example(Box(50, 40, 68, 58)), TINY)
    assert crop.size == (48, 48)
    # 30 pixels from 44 and 34 on, enlarged by 1.6: the centre of pixel 24 lies at 44 + 24.5 / 1.6 -
    # 0.5.
    assert pixels(crop)[24, 24].tolist() == [59, 49, 0]
    assert pixels(crop)[:, :, 0].min() == 44
    assert pixels(crop)[:, :, 0].max() == 73
    np.testing.assert_array_equal(
        pixels(crop),
        pixels(
            gradient(128, 100).crop((44, 34, 74, 64)).resize((48, 48), Image.Resampling.BICUBIC)
        ),
    )


def test_a_crop_holds_the_pixels_of_its_region_untouched_where_nothing_is_enlarged() -> None:
    (crop,) = teacher_images(example(Box(20, 30, 60, 50)), BARE)
    np.testing.assert_array_equal(pixels(crop), pixels(gradient(128, 100))[30:50, 20:60])
    (twice,) = teacher_images(
        example(Box(20, 30, 60, 50)), ViewOptions(margin=0, min_size=1, enlarge=2)
    )
    assert twice.size == (80, 40)


def test_enlarging_is_bicubic() -> None:
    image = Image.effect_noise((20, 20), 80).convert("RGB")
    (crop,) = teacher_images(
        example(Box(0, 0, 20, 20), images=(image,)), ViewOptions(margin=0, min_size=50)
    )
    np.testing.assert_array_equal(
        pixels(crop), pixels(image.resize((50, 50), Image.Resampling.BICUBIC))
    )


def test_several_boxes_give_a_hull_or_a_crop_each() -> None:
    boxes = (Box(20, 30, 60, 50), Box(70, 10, 80, 20))
    (crop,) = teacher_images(example(*boxes), BARE)
    np.testing.assert_array_equal(pixels(crop), pixels(gradient(128, 100))[10:50, 20:80])
    first, second = teacher_images(example(*boxes), ViewOptions(margin=0, min_size=1, boxes="each"))
    np.testing.assert_array_equal(pixels(first), pixels(gradient(128, 100))[30:50, 20:60])
    np.testing.assert_array_equal(pixels(second), pixels(gradient(128, 100))[10:20, 70:80])


def test_an_image_without_a_box_stays_whole_and_in_its_place() -> None:
    images = (Image.new("RGB", (9, 9), "red"), gradient(128, 100), Image.new("RGB", (8, 8), "blue"))
    views = teacher_images(example(Box(20, 30, 60, 50, image=1), images=images), BARE)
    assert [view.size for view in views] == [(9, 9), (40, 20), (8, 8)]
    np.testing.assert_array_equal(pixels(views[1]), pixels(gradient(128, 100))[30:50, 20:60])
    assert pixels(views[2])[0, 0].tolist() == [0, 0, 255]


def test_controls_full_and_wrong() -> None:
    one = example(Box(20, 30, 60, 50), teacher_images=(Image.new("RGB", (5, 5)),))
    (full,) = teacher_images(one, ViewOptions(kind="full"))
    np.testing.assert_array_equal(pixels(full), pixels(gradient(128, 100)))
    (wrong,) = teacher_images(one, ViewOptions(kind="wrong", margin=0, min_size=1))
    assert wrong.size == (40, 20)
    row, column = pixels(wrong)[0, 0, 1], pixels(wrong)[0, 0, 0]
    np.testing.assert_array_equal(
        pixels(wrong), pixels(gradient(128, 100))[row : row + 20, column : column + 40]
    )
    assert column >= 60 or column + 40 <= 20 or row >= 50 or row + 20 <= 30


def test_given_teacher_images_are_used_as_they_are() -> None:
    given_image = Image.new("RGB", (5, 7), "red")
    (view,) = teacher_images(example(Box(20, 30, 60, 50), teacher_images=(given_image,)), TINY)
    assert view.size == (5, 7)


@pytest.mark.parametrize(
    ("one", "kind"),
    [
        (example(), "crop"),
        (example(Box(0, 0, 5, 5, image=1)), "crop"),
        (example(teacher_images=(Image.new("RGB", (5, 5)),)), "wrong"),
    ],
    ids=["no evidence", "no such image", "wrong without boxes"],
)
def test_an_example_without_evidence_is_an_error(one: Example, kind: str) -> None:
    with pytest.raises(DataError, match=f"example example-1: the view '{kind}' needs boxes"):
        teacher_images(one, ViewOptions.model_validate({"kind": kind}))


def test_students_see_their_images_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned to the right by 90 degrees
    gradient(40, 20).save(tmp_path / "turned.png", exif=exif)
    (image,) = student_images(Example("id", (tmp_path / "turned.png",), "What?"))
    np.testing.assert_array_equal(pixels(image), np.rot90(pixels(gradient(40, 20)), -1))
    (crop,) = teacher_images(
        Example("id", (tmp_path / "turned.png",), "What?", (Box(0, 30, 20, 40),)), BARE
    )
    np.testing.assert_array_equal(pixels(crop), np.rot90(pixels(gradient(40, 20)), -1)[30:40])


@pytest.mark.parametrize(
    "options",
    [
        {"margin": -1},
        {"min_size": 0},
        {"enlarge": 0.5},
        {"kind": "crops"},
        {"marign": 3},
        {"margin": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_or_unknown_are_errors(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ViewOptions.model_validate(options)
