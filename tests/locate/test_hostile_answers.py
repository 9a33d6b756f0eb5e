"""What models write in place of a box: by hand, and by hypothesis. Never an error, never a box
outside of the picture, and never anything evaluated."""

from __future__ import annotations

import math
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.locate.grounding import LONGEST, parse

SIZE, RESIZED = (160, 80), (224, 112)

NUMBERS = [
    "nan, nan, nan, nan",
    "NaN, 1, 2, 3",
    "inf, 0, 1, 1",
    "-Infinity, 0, 1, 1",
    "1e999, 0, 1, 1",
    "1e2, 1e2, 2e2, 2e2",
    "0x10, 0, 20, 20",
    "1_0, 1_0, 2_0, 2_0",
    "\u0661\u0660, \u0661\u0660, \u0662\u0660, \u0662\u0660",  # Arabic digits
    "\u00b2, 1, 2, 3",
    "9" * 5000 + ", 1, 2, 3",
    "1, 2, 3, " + "9" * 400,
    "1.2.3, 4, 5, 6",
    "1,, 2, 3, 4",
    "1; 2; 3; 4",
    "1 2 3 4",
    "1, 2, 3",
    "1, 2, 3, 4, 5",
    "1, 2",
    "",
    "x1, y1, x2, y2",
    "'1', '2', '3', '4'",
    "null, null, null, null",
    "true, false, true, true",
    "[1, 2], [3, 4]",
    "100, 100, 100, 100",
    "200, 200, 100, 100",
    "100, 200, 200, 100",
    "0, 0, 0, 0",
    "0, 0, 1, 1",
    "-5, -5, -1, -1",
    "-100, 10, 50, 50",
    "5000, 5000, 6000, 6000",
    "100, 100, 5000, 5000",
    "1000, 1000, 1001, 1001",
    "0.1, 0.1, 0.4, 0.9",
    "__import__('os').system('false'), 1, 2, 3",
    "1 + 1, 2, 3, 4",
    "..., 1, 2, 3",
    "- 5, 1, 2, 3",
    "--5, 1, 2, 3",
    "+5, 1, 20, 30",
    ".5, .5, .9, .9",
    "1., 2., ., 4.",
]
"""Four numbers that are none, or no box in per-mille and in resized pixels."""

WRITTEN = ['[{{"bbox_2d": [{}], "label": "x"}}]', "[{}]"]
"""The ways in which they are tried."""

TEXTS = [
    "",
    " ",
    "\0",
    "\ud800",
    "\u202e[1",
    "I cannot see it.",
    "The box is at the top left.",
    "None",
    "null",
    "[]",
    "{}",
    '{"bbox_2d": null}',
    '{"bbox_2d": []}',
    '{"bbox_2d": {}}',
    '{"bbox_2d": "1, 2, 3, 4"}',
    '{"bbox_2d": [1, 2, 3',
    '{"bbox_2d"',
    '{"point_2d": [10, 20]}',
    '"bbox_2d" : ' * 2000,
    "[" * 100_000,
    "(" * 100_000,
    "[1, " * 30_000,
    "(1,1),(" * 15_000,
    '{"bbox_2d": [' * 10_000,
    "1" * 200_000,
    "{" * 50_000 + "}" * 50_000,
    "(5,5)",
    "(5,5),(5,5)",
    "(50,50),(5,5)",
    "(1,2,3,4)",
    "<box>1,2,3,4</box>",
    "<|box_start|><|box_end|>",
    "<|box_start|>(1,2)<|box_end|>",
    "<loc0001><loc0002><loc0003><loc0004>",
    " " * 100_000 + "[1, 2, 3, 4",
    '"bbox_2d":' + " " * 50_000 + "[10, 10, 20, 20]",
]


def check_boxes(found):
    """All boxes lie in the picture, and have an extent."""
    for box in found:
        corners = (box.x0, box.y0, box.x1, box.y1)
        assert all(math.isfinite(corner) for corner in corners)
        assert -1 <= box.x0 < box.x1 <= SIZE[0] + 1
        assert -1 <= box.y0 < box.y1 <= SIZE[1] + 1


HOSTILE = [way.format(numbers) for way in WRITTEN for numbers in NUMBERS] + TEXTS


def test_there_are_a_hundred():
    assert len(set(HOSTILE)) >= 100


@pytest.mark.parametrize("unit", ["per-mille", "resized"])
def test_hostile_answers_hold_no_box(unit):
    began = time.perf_counter()
    held = [text for text in HOSTILE if parse(text, unit, SIZE, RESIZED)]
    assert time.perf_counter() - began < 5
    assert held == []


@pytest.mark.parametrize(
    "text",
    [
        '[{"bbox_2d": [250, 500, 500, 750], "label": "a"}]',
        '{"bbox": [250, 500, 500, 750]}',
        '{"bbox_2d": [[250, 500, 500, 750]]}',
        '{"bbox_2d": [[[250, 500, 500, 750]]]}',
        "((250,500),(500,750)",
        '```json\n[\n\t{"bbox_2d":[250,500,500,750],"label":"[1, 2, 3, 4]"',
        "a(250,500),(500,750)",
        "( 250 , 500 ) , ( 500 , 750 )",
        "It is at [250, 500, 500, 750].",
        "[250.0, 500.00, 500., 750]",
        "x" * 1000 + "[250, 500, 500, 750]",
    ],
)
def test_answers_in_any_usual_form_are_read(text):
    (box,) = parse(text, "per-mille", SIZE, RESIZED)
    assert (box.x0, box.y0, box.x1, box.y1) == (40, 40, 80, 60)


def test_only_the_beginning_of_an_answer_is_read():
    assert parse("x" * LONGEST + "[250, 500, 500, 750]", "per-mille", SIZE, RESIZED) == ()


PIECES = st.sampled_from(
    [
        '"bbox_2d"',
        ": ",
        "[",
        "]",
        "(",
        ")",
        ",",
        " ",
        "10",
        "500",
        "1000",
        "-3",
        "1.5",
        "9" * 12,
        ".",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=25).map("".join)),
    st.sampled_from(["per-mille", "resized"]),
)
def test_any_answer_is_read_without_an_error(text, unit):
    check_boxes(parse(text, unit, SIZE, RESIZED))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=4, max_size=4))
def test_a_box_is_read_back(numbers):
    x0, y0, x1, y1 = numbers
    found = parse(f'{{"bbox_2d": {numbers}}}', "per-mille", (1000, 1000), (0, 0))
    if x0 < x1 and y0 < y1 and max(numbers) > 1 and min(x0, y0) < 1000:
        (box,) = found
        assert (box.x0, box.y0, box.x1, box.y1) == pytest.approx((x0, y0, x1, y1))
    else:
        assert found == ()
