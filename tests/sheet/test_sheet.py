"""The contact sheet: what student and teacher see, pixel for pixel, and every text of the data."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from opd.data import open_data
from opd.sheet import Card, cards, page, png
from opd.sheet.cards import Shown, card, factor_for, printable
from opd.sheet.fonts import MISSING, Fonts
from opd.types import Box, Example
from opd.views.images import student_images, teacher_images
from opd.views.view import ViewOptions
from opd_cli import main
from tests.support.dirty import picture

RED = (255, 0, 0)
SIZE = 120, 90
BOX = 20, 30, 60, 50


def run(*arguments):
    return CliRunner().invoke(main, ["data", "show", *map(str, arguments)])


@pytest.fixture
def data(tmp_path):
    """Three rows of two pictures, one of which is too large for the sheet."""
    picture(0).save(tmp_path / "small.png")
    picture(1).resize((2400, 1800)).save(tmp_path / "large.png")
    small = {"image": "small.png", "question": "What?", "boxes": [BOX], "answer": "12"}
    rows = [
        {"id": "first", **small, "choices": ["11", "12"]},
        {"image": "large.png", "question": "Which?", "boxes": [[400, 600, 1200, 1000]]},
        {"id": "<third>", **small, "question": "<script>alert(1)</script> & \u202e\x07 'x' \"y\""},
    ]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def found(sheet, pixels):
    """Left and top of an image in a sheet; None if it is not in it."""
    for top, left in np.argwhere((sheet == pixels[0, 0]).all(axis=2)).tolist():
        part = sheet[top : top + len(pixels), left : left + pixels.shape[1]]
        if part.shape == pixels.shape and (part == pixels).all():
            return left, top
    return None


def repeated(pixels, factor):
    return np.repeat(np.repeat(pixels, factor, axis=0), factor, axis=1)


def test_pixels_of_a_picture(data, tmp_path):
    """The crop is the teacher's, each pixel a square; the box of the student's picture is free
    inside and red around it."""
    out = tmp_path / "sheet.png"
    done = run(data, "--out", out, "--count", 1)
    assert done.exit_code == 0, done.output
    assert done.stdout == f"{out}: 1 row\n"
    sheet = np.asarray(Image.open(out))
    assert sheet.shape[1] >= 900
    example = open_data(str(data), count=1)[0]
    view = ViewOptions(enlarge=2.0)  # as the preset lora has it
    (crop,) = map(np.asarray, teacher_images(example, view))
    factor = int(factor_for(crop.shape[1::-1], png.TEACHER))
    assert found(sheet, repeated(crop, factor)) is not None
    (full,) = map(np.asarray, student_images(example))
    factor = int(factor_for(SIZE, png.STUDENT))
    wanted = repeated(full, factor).copy()
    x0, y0, x1, y1 = (corner * factor for corner in BOX)
    wide = png.FRAME
    inside = wanted[y0:y1, x0:x1].copy()
    around = wide + png.HALO
    wanted[y0 - around : y1 + around, x0 - around : x1 + around] = 255
    wanted[y0 - wide : y1 + wide, x0 - wide : x1 + wide] = RED
    wanted[y0:y1, x0:x1] = inside
    assert found(sheet, wanted) is not None


def test_a_large_picture_is_scaled_down(data):
    example = open_data(str(data))[1]
    (shown,) = card(example, ViewOptions()).student
    factor = factor_for(shown.image.size, png.STUDENT)
    pixels = np.asarray(png.drawn(shown, factor))
    assert pixels.shape[:2] == (640, round(2400 * factor))
    rows, columns = np.nonzero((pixels == RED).all(axis=2))
    assert columns.min() == round(400 * factor) - png.FRAME
    assert rows.max() == round(1000 * factor) + png.FRAME - 1


@pytest.mark.parametrize(
    "kind", ["crop", "context", "several", "marked", "degrade", "full", "wrong"]
)
def test_every_view_is_shown_as_it_is_made(data, kind):
    example, view = open_data(str(data))[0], ViewOptions(kind=kind)
    made = card(example, view)
    assert made.fault == ""
    for shown, seen in (
        (made.student, student_images(example, view)),
        (made.teacher, teacher_images(example, view)),
    ):
        assert len(shown) == len(seen)
        for one, other in zip(shown, seen, strict=True):
            assert np.array_equal(one.image, other)
    scale = made.student[0].image.width / SIZE[0]  # degraded images are smaller
    assert made.student[0].boxes == (pytest.approx([corner * scale for corner in BOX], abs=0.3),)
    assert (scale < 1) == (kind == "degrade")


class Page(HTMLParser):
    """The tags and texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def of(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def opened(uri):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_a_page(data, tmp_path):
    out = tmp_path / "sheet.html"
    done = run(data, "--out", out, "--model", "tiny", "--set", "view.enlarge=2.0")
    assert done.exit_code == 0, done.output
    text = out.read_text()
    made = Page(text)
    examples = open_data(str(data))
    images = [opened(image["href"]) for image in made.of("image")]
    view = ViewOptions(enlarge=2.0)
    assert np.array_equal(images[0], student_images(examples[0])[0])
    assert images[2].shape[:2] == (960, 1280)  # scaled down
    boxes = [
        [float(box[name]) for name in ("x", "y", "width", "height")]
        for box in made.of("rect")
        if "class" not in box
    ]
    assert boxes[:2] == [[20, 30, 40, 20], [400, 600, 800, 400]]
    assert "student: 2,400 x 1,800 pixels" in made.text
    assert re.search(r"student \d+ tokens, teacher \d+ tokens", made.text)
    assert "A. 11\nB. 12" in made.text
    assert "Answer: 12" in made.text
    # What the data say is text, and steers nothing.
    assert "<script>alert(1)</script> & \\u202e\\x07 'x' \"y\"" in made.text
    assert "<third>" in made.text
    assert not made.of("script")
    assert "\u202e" not in text
    (policy,) = [meta for meta in made.of("meta") if "http-equiv" in meta]
    assert policy["content"].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert not made.of("link")
    assert not any("style" in attributes for _, attributes in made.tags)
    assert not re.search(r'(href|src)="(?!data:image/)', text)
    crop = np.asarray(teacher_images(examples[0], view, 10**6)[0])
    assert np.array_equal(images[1], crop)


def test_a_row_that_cannot_be_used_says_why():
    example = Example("odd", (picture(0),), "What?", (Box(500, 500, 600, 600),), source="x:1")
    made = card(example, ViewOptions())
    assert "outside the image" in made.fault
    assert "outside the image" in Page(page.sheet("x", [made]).decode()).text
    assert png.sheet("x", [made]).startswith(b"\x89PNG")


def test_a_mixture_and_a_seed_are_those_of_the_run(data, tmp_path):
    shares = "view.mixture={crop = 0.5, full = 0.5}"
    for suffix in ("png", "html"):
        assert run(data, "--out", tmp_path / f"a.{suffix}", "--set", shares).exit_code == 0
    assert "view crop 0.5, full 0.5" in (tmp_path / "a.html").read_text()
    assert run(data, "--out", tmp_path / "b.html", "--view", "full").exit_code == 0
    assert "view full" in (tmp_path / "b.html").read_text()


def test_tiny_needs_no_file(tmp_path):
    done = run("tiny", "--out", tmp_path / "tiny.png", "--count", 2)
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["data.jsonl"], "Missing option '--out'"),
        (["data.jsonl", "--out", "sheet.pdf"], "name it .png or .html"),
        (["data.jsonl", "--out", "small.png"], "'small.png' exists, and is no sheet of opd"),
        (["data.jsonl", "--out", "no/sheet.png"], "'no' is not a folder"),
        (["data.jsonl", "--out", "a.png", "--count", "500"], "would be too tall; take at most 40"),
        (["data.jsonl", "--out", "a.png", "--count", "0"], "0 is not in the range"),
        (["data.jsonl", "--out", "a.png", "--view", "corp"], "did you mean 'crop'?"),
        (["gone.jsonl", "--out", "a.png"], "data file not found: gone.jsonl"),
    ],
)
def test_a_mistake_is_one_line(data, monkeypatch, arguments, said):
    monkeypatch.chdir(data.parent)
    before = sorted(data.parent.iterdir())
    done = run(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line
    assert sorted(data.parent.iterdir()) == before


def test_a_sheet_replaces_a_sheet(data, tmp_path):
    for name in ("sheet.png", "sheet.html"):
        for _ in range(2):
            assert run(data, "--out", tmp_path / name, "--count", 1).exit_code == 0
    (tmp_path / "mine.html").write_text("<html>")
    assert run(data, "--out", tmp_path / "mine.html").exit_code == 2


def test_lines_are_broken_between_words():
    fonts = Fonts(28)
    text = "What is written on the small sign beside the entrance? " * 3
    lines = fonts.wrapped(text.strip(), 600)
    assert " ".join(lines) == text.strip()
    assert all(fonts.width(line) <= 600 for line in lines)
    assert len(lines) > 3
    long = fonts.wrapped(f"See {'x' * 200} there", 600)
    assert "".join(long).replace(" ", "") == f"See{'x' * 200}there"
    assert all(fonts.width(line) <= 600 for line in long)
    assert fonts.wrapped("one\n\ntwo", 600) == ["one", "", "two"]


def test_characters_that_no_font_has_are_told(monkeypatch):
    monkeypatch.setattr("opd.sheet.fonts._files", list)  # a machine without fonts
    asked = [Card("id", "", (), (), f"What is {word}?") for word in ("\u4e2d\u6587", "this")]
    foreign, latin = (Image.open(io.BytesIO(png.sheet("title", [each]))) for each in asked)
    assert foreign.height > latin.height  # by a note
    fonts = Fonts(28)
    assert "".join(part for _, part in fonts.runs("abc \u4e2d def")) == f"abc {MISSING} def"
    assert fonts.missing >= {"\u4e2d"}
    assert len(list(fonts.runs("abc def"))) == 1


def test_texts_do_not_steer():
    assert printable("a\u202eb\x00c\td\r\ne") == "a\\u202eb\\x00c    d\ne"
    assert printable("中 ماء नमस्ते 😀") == "中 ماء नमस्ते 😀"


@pytest.mark.parametrize(
    ("size", "factor"), [((100, 100), 5), ((10, 10), 8), ((500, 500), 1), ((5000, 100), 0.1)]
)
def test_factors(size, factor):
    assert factor_for(size, (500, 500)) == factor


def test_cards_are_made_one_by_one(data):
    """So that no more than one row's pictures are in memory."""
    made = cards(iter(open_data(str(data))), ViewOptions())
    assert next(made).id == "first"
    assert isinstance(next(made).student[0], Shown)
