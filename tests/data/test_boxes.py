"""Boxes of every unit and spelling become the same pixels of the upright picture."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as qwen

from opd.data import open_data
from opd.data.boxes import STORED, UNSETTLED, Drawn, boxes, stated_format, stated_image
from opd.data.frames import turn
from opd.data.remarks import Remarks, tells_place
from opd.data.resizing import MAX_PIXELS, smart_resize
from opd.errors import DataError
from opd.types import Box

SIZE = (600, 400)
BOX = Box(120, 40, 300, 80)


def one(value: Any, format: str = "pixels", size: tuple[int, int] = SIZE, **row: Any) -> Box:
    (box,) = boxes({"boxes": value, **row}, [size], Drawn(format))  # type: ignore[arg-type]
    return box


def close(box: Box) -> Any:
    return pytest.approx((box.x0, box.y0, box.x1, box.y1), abs=1e-9)


def numbers(box: Box) -> tuple[float, ...]:
    return box.x0, box.y0, box.x1, box.y1


UNITS = {
    "pixels": [120, 40, 300, 80],
    "fraction": [0.2, 0.1, 0.5, 0.2],
    "per-mille": [200, 100, 500, 200],
    # 600 x 400 becomes 588 x 392.
    "resized": [120 * 0.98, 40 * 0.98, 300 * 0.98, 80 * 0.98],
    # The square has 600 pixels a side, and the picture begins 100 pixels below its top.
    "padded": [0.2, 140 / 600, 0.5, 180 / 600],
}


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_is_pixels(unit: str) -> None:
    x0, y0, x1, y1 = UNITS[unit]
    assert numbers(one([UNITS[unit]], unit)) == close(BOX)
    assert numbers(one([[x0, y0, x1 - x0, y1 - y0]], f"{unit}-xywh")) == close(BOX)


@pytest.mark.parametrize(
    "value",
    [
        [[120, 40, 300, 80]],
        [120, 40, 300, 80],
        "[120, 40, 300, 80]",
        "[[120, 40, 300, 80]]",
        "120,40, 300,80",
        "(120,40),(300,80)",
        "[(120, 40), (300, 80)]",
        " ( 120 , 40 , 300 , 80 ) ",
        ["[120, 40, 300, 80]"],
        ["(120,40),(300,80)"],
        [{"box": [120, 40, 300, 80]}],
        [{"image": 0, "box": "120, 40, 300, 80"}],
        "[120.0, 4e1, 300, 80]",
    ],
    ids=str,
)
def test_every_spelling_is_the_same_box(value: Any) -> None:
    assert one(value) == BOX


def test_several_boxes_of_a_row() -> None:
    row = {"boxes": "[1, 2, 3, 4], [5, 6, 7, 8]"}
    assert boxes(row, [SIZE], Drawn()) == (Box(1, 2, 3, 4), Box(5, 6, 7, 8))
    assert boxes({"boxes": "[]"}, [SIZE], Drawn()) == ()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], "are 8 numbers in one list; write each box as a list of its"),
        ([1, 2, 3, 4, 5], "[1, 2, 3, 4, 5] is not a box of four numbers"),
        ([[10, 20]], "bottom]; a point has no extent"),
        ("(10, 20)", "a point has no extent"),
        ("(1,2),(3,4),(5,6)", "[1, 2] is not a box of four numbers"),
        ([[[1, 2, 3, 4]]], "is not a box of four numbers"),
        ("__import__('os').getcwd()", "is not a list of numbers"),
        ("[1, 2, 3, 4", "is not a list of numbers"),
        ("", "is not a list of numbers"),
        ("[" * 90_000, "is not a list of numbers"),
        ("1," * 60_000, "is not a list of numbers"),
        ("9" * 50_000, "is not a list of numbers"),
        ("[NaN, 1, 2, 3]", "is not finite"),
        (["red"], '"red" is not a list of numbers'),
        ([["1", "2", "3", "4"]], "is not a box of four numbers"),
        ({"x": 1}, "is not a list of boxes"),
        ([120, 40, 80, 30], 'say "box_format": "pixels-xywh"'),
        ([0.2, 0.1, 0.5, 0.2], 'say "box_format": "fraction"'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_is_no_box_is_told_in_one_short_line(value: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        one(value)
    said = str(caught.value)
    assert message in said
    assert said.startswith("field 'boxes': ")
    assert len(said) < 250
    assert "\n" not in said


@pytest.mark.parametrize(
    ("box", "format", "message"),
    [
        ([0, 0, 3.2, 1], "fraction", "outside 0..1, the range of fraction"),
        ([0, 0, 0.5, 0.5], "resized", "at most one pixel"),
        ([0, 0, 590, 10], "resized", "outside the resized image of 588 x 392 pixels"),
        ([0, 0, 0.5, 0.1], "padded", "outside the image in its padded square"),
        ([0.2, 0.1, 0.3, 0.4], "padded", "from 0, 0.167 to 1, 0.833"),
        ([500, 20, 200, 30], "pixels-xywh", "outside the image of 600 x 400 pixels"),
        ([5, 20, 0, 30], "pixels-xywh", "empty or inverted; a box is [left, top, width, height]"),
        ([5, 20, 30, -3], "per-mille-xywh", "empty or inverted"),
    ],
)
def test_a_contradiction_is_an_error(box: list[float], format: str, message: str) -> None:
    with pytest.raises(DataError, match=r"field 'boxes': box \[") as caught:
        one([box], format)
    assert message in str(caught.value)


def test_other_programs_rows_are_told_the_option() -> None:
    for box, option in ([0.2, 0.1, 0.5, 0.2], "fraction"), ([120, 40, 80, 30], "pixels-xywh"):
        with pytest.raises(DataError, match=rf"say data\.box_format={option}$"):
            boxes({"boxes": [box]}, [SIZE], Drawn(ours=False))


def test_rounding_beyond_the_picture_is_cut_off() -> None:
    assert one([[-0.4, 0, 588.9, 392.5]], "resized", (588, 392)) == Box(0, 0, 588, 392)
    box = one([[0, 0.1664, 1.0004, 0.5]], "padded")
    assert numbers(box) == close(Box(0, 0, 600, 200))
    assert one([[-0.5, 0, 600.5, 400]]) == Box(-0.5, 0, 600.5, 400)  # as ever: views cut it


def test_the_resized_picture_may_be_stated() -> None:
    assert one([[30, 10, 75, 20]], "resized", box_size=[150, 100]) == BOX
    assert one([[30, 10, 75, 20]], "resized", box_size="150, 100") == BOX
    row = {"boxes": [{"image": 1, "box": [30, 10, 75, 20]}], "box_size": [[9, 9], [150, 100]]}
    assert boxes(row, [SIZE, SIZE], Drawn("resized")) == (Box(120, 40, 300, 80, 1),)
    for wrong in ([150], [0, 5], [150, "x"], "x", 5, {"w": 1}, [[9, 9]] * 0, [float("inf"), 1]):
        with pytest.raises(DataError, match="field 'box_size'"):
            one([[30, 10, 75, 20]], "resized", box_size=wrong)


@given(st.integers(1, 6000), st.integers(1, 6000))
def test_resizing_is_that_of_the_processor(width: int, height: int) -> None:
    bounds = {"min_pixels": 3136, "max_pixels": MAX_PIXELS}
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(DataError, match="longer than 200 times"):
            smart_resize(width, height)
    else:
        assert smart_resize(width, height) == qwen.smart_resize(height, width, **bounds)[::-1]


EXIF = 0x0112


@pytest.mark.parametrize("orientation", range(1, 9))
def test_stored_boxes_turn_with_the_picture(orientation: int) -> None:
    """The pixels of a box in the stored picture are those of the turned box in the upright one."""
    pixels = np.zeros((40, 60), np.uint8)
    pixels[5:12, 20:50] = 255
    image = Image.fromarray(pixels)
    image.getexif()[EXIF] = orientation
    upright = np.asarray(ImageOps.exif_transpose(image))
    ys, xs = np.nonzero(upright)
    expected = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    assert turn((20, 5, 50, 12), (60, 40), orientation) == expected
    size = upright.shape[::-1]
    for format, box in (
        ("pixels", [20, 5, 50, 12]),
        ("fraction", [20 / 60, 5 / 40, 50 / 60, 12 / 40]),
        ("pixels-xywh", [20, 5, 30, 7]),
    ):
        drawn = Drawn(format, "stored")  # type: ignore[arg-type]
        (found,) = boxes({"boxes": [box]}, [size], drawn, lambda _: orientation)
        assert numbers(found) == pytest.approx(expected)


UPRIGHT = Drawn()


def read(size: Any, drawn: Drawn = UPRIGHT, orientation: int = 6) -> tuple[Box, list[str]]:
    """A box in a picture of 200 x 300 that is stored as 300 x 200."""
    heard: list[str] = []
    row = {"boxes": [[10, 20, 110, 50]], "box_size": size}
    (box,) = boxes(row, [(200, 300)], drawn, lambda _: orientation, heard.append)
    return box, heard


def test_the_rows_size_of_a_turned_picture_shows_what_boxes_are_drawn_on() -> None:
    assert read([300, 200]) == (Box(150, 10, 180, 110), [STORED])
    assert read([200, 300]) == (Box(10, 20, 110, 50), [])
    assert read(None) == (Box(10, 20, 110, 50), [])
    # What a person says goes before the evidence.
    assert read([300, 200], Drawn(image="upright")) == (Box(10, 20, 110, 50), [])
    assert read([200, 300], Drawn(image="stored")) == (Box(150, 10, 180, 110), [])
    for size, orientation in ([300, 200], 1), ([300, 200], 3), ([150, 100], 6):
        with pytest.raises(DataError, match="is not the size of the picture, which is 200 x 300"):
            read(size, orientation=orientation)
    # A share of the picture is the same in every size.
    thousandths = Drawn("per-mille")
    assert read([100, 150], thousandths)[0] == read(None, thousandths)[0]
    assert read([300, 200], thousandths)[1] == [STORED]


def test_boxes_of_a_picture_that_was_resized_since() -> None:
    with pytest.raises(DataError, match=r'say "box_format": "resized"$'):
        one([30, 10, 75, 20], box_size=[150, 100])
    row = {"boxes": [30, 10, 45, 10], "box_size": [150, 100]}
    with pytest.raises(DataError, match=r"say data\.box_format=resized-xywh$"):
        boxes(row, [SIZE], Drawn("pixels-xywh", ours=False))
    assert one([30, 10, 45, 10], "resized-xywh", box_size=[150, 100]) == BOX


def test_the_unit_is_the_rows_or_said_or_the_formats() -> None:
    assert stated_format({}) == "pixels"
    assert stated_format({}, "pixels-xywh") == "pixels-xywh"
    assert stated_format({}, "pixels-xywh", "fraction") == "fraction"
    assert stated_format({"box_format": "padded"}, "pixels") == "padded"
    assert stated_format({"box_format": UNSETTLED}, "pixels", "resized") == "resized"
    for row, said, message in (
        ({"box_format": "padded"}, "fraction", "the row says padded, and data.box_format says"),
        ({"box_format": UNSETTLED}, "", "data.box_format=resized .* or data.box_format=per-mille"),
        ({"box_format": "pixel"}, "", "did you mean 'pixels'"),
    ):
        with pytest.raises(DataError, match=message):
            stated_format(row, "pixels", said)
    assert stated_image({}) == ""
    assert stated_image({"box_image": "stored"}, "upright") == "stored"
    with pytest.raises(DataError, match='field \'box_image\': "raw" is not "upright" or'):
        stated_image({"box_image": "raw"})


def test_a_row_of_our_own_may_hold_all_of_it(tmp_path: Any) -> None:
    image = Image.new("RGB", (300, 200))
    exif = Image.Exif()
    exif[EXIF] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    row = {"image": "turned.jpg", "question": "In [1, 2, 3, 4]?", "boxes": "10, 20, 110, 50"}
    rows = [
        row,
        {**row, "box_image": "stored"},
        {**row, "box_size": [300, 200]},
        {**row, "boxes": [10, 20, 100, 30], "box_format": "pixels-xywh"},
        {**row, "box_size": [30, 20]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = open_data(str(tmp_path / "rows.jsonl"))
    upright, stored = Box(10, 20, 110, 50), Box(150, 10, 180, 110)
    assert [example.boxes[0] for example in found] == [upright, stored, stored, upright]
    assert [source for source, _ in found.skipped] == ["rows.jsonl:5"]
    assert [note.rpartition("(")[2] for note in found.notes] == ["4 rows)", "1 row)"]
    assert found.notes[1].startswith("the size that a row gives its picture is that before EXIF")


@pytest.mark.parametrize(
    ("question", "tells"),
    [
        ("What is in <bbox>?", True),
        ("What is at <|box_start|>(1,2),(3,4)<|box_end|>?", True),
        ("What does [102, 33, 150, 60] show?", True),
        ("What does (0.1, 0.2, 0.31, 0.4) show?", True),
        ("Look at (120,300),(180,352).", True),
        ('{"bbox_2d": [1]}', True),
        ("Is it (A) 1, 2 (B) 3, 4?", False),
        ("Which of 1, 2, 3, 4 is it?", False),
        ("Which year, 1999 or [2000]?", False),
        ("[1, 2, 3]", False),
    ],
)
def test_a_question_that_tells_the_place(question: str, tells: bool) -> None:
    assert tells_place(question) == tells


def test_remarks_are_counted() -> None:
    remarks = Remarks()
    for remark in "aba":
        remarks.add(remark)
    assert remarks.notes() == ["a (2 rows)", "b (1 row)"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=5)
            | st.dictionaries(st.sampled_from(["image", "box", "bbox", "x"]), inner)
        ),
        max_leaves=12,
    ),
    st.sampled_from(["pixels", "padded", "resized-xywh", "fraction"]),
)
def test_any_value_is_boxes_or_one_line(value: Any, format: str) -> None:
    found, said = (), ""
    try:
        found = boxes({"boxes": value}, [SIZE, (9, 2000)], Drawn(format))  # type: ignore[arg-type]
    except DataError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 400
    for box in found:
        width, height = [SIZE, (9, 2000)][box.image]
        assert -1 <= box.x0 < box.x1 <= width + 1
        assert -1 <= box.y0 < box.y1 <= height + 1
