"""Locators on a toy whose attention, certainty and texts are planted."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from opd.errors import BackendError, ModelError
from opd.locate import grounding
from opd.locate.attention import relative
from opd.locate.tiles import tiles
from opd.testing.toy import ToyBackend
from opd.types import Box
from tests.locate.looking import GridEncoder, SeesRed, example, located, looker, picture


class Looks(SeesRed):
    """Looks at a place of the first image for a question of five letters; for six at one of the
    second, and less at one of the first."""

    look: ClassVar = {
        5: [(0, (40, 20, 80, 40), 0.1)],
        6: [(1, (100, 40, 140, 60), 0.1), (0, (40, 20, 80, 40), 0.05)],
    }


def numbers(found):
    (box,) = found.boxes
    return box.x0, box.y0, box.x1, box.y1, box.image


def test_attention_finds_where_one_token_of_the_answer_looks():
    """Although the first visual token has the most attention, under any question."""
    (one, two), _ = located(
        "attention",
        looker(Looks()),
        [example(picture()), example(picture(), picture(), question="second")],
    )
    assert numbers(one) == pytest.approx((40, 20, 80, 40, 0))
    assert numbers(two) == pytest.approx((100, 40, 140, 60, 1))
    assert one.confidence == pytest.approx(1 - 4 / 64)


def test_attention_finds_nothing_where_the_question_changes_nothing():
    (one,), _ = located("attention", looker(Looks()), [example(picture(), question="else")])
    assert one.boxes == ()
    assert one.confidence == 0


def test_relative_attention_by_hand():
    asked = np.array([[[0.1, 0.2], [0.3, 0.1]]], np.float32)
    neutral = np.array([[[0.2, 0.05], [0.4, 0.15]]], np.float32)
    # The largest row over the mean neutral one, (0.3, 0.1), both with its mean of 0.2 added.
    np.testing.assert_allclose(relative(asked, neutral), [0.5 / 0.5, 0.4 / 0.3], rtol=1e-6)


def test_attention_needs_a_model_that_says_it():
    class Blind(ToyBackend):
        attends = False

    with pytest.raises(BackendError, match="attention cannot be read"):
        located("attention", looker(Blind()), [example(picture())])


def test_the_tiles_overlap_on_three_scales():
    every = tiles([(120, 60)])
    assert len(every) == 9 + 25 + 49
    assert every[:2] == [Box(0, 0, 60, 30), Box(30, 0, 90, 30)]
    assert every[-1] == Box(90, 45, 120, 60)
    assert [box.image for box in tiles([(8, 8), (8, 8)], (2,))] == [0] * 9 + [1] * 9


def test_tiles_finds_the_most_certain_tile():
    (one, two), _ = located(
        "tiles",
        looker(),
        [
            example(picture((100, 20, 140, 40))),
            example(picture(), picture((0, 60, 40, 80)), question="second"),
        ],
    )
    assert one.boxes == (Box(100, 20, 140, 40),)
    assert two.boxes == (Box(0, 60, 40, 80, image=1),)
    assert one.confidence == pytest.approx(1)


def test_tiles_finds_nothing_where_the_full_picture_is_most_certain():
    (black, red), _ = located(
        "tiles", looker(), [example(picture()), example(picture((0, 0, 160, 80)))]
    )
    assert (black.boxes, black.confidence) == (red.boxes, red.confidence) == ((), 0.0)


def test_tiles_asks_one_question_of_tile_and_whole():
    """A teacher's question, and a teacher's image, are of other pictures."""

    class Records(GridEncoder):
        seen: ClassVar = []

        def encode(self, images, question, policy="student"):
            self.seen.append((question, policy))
            return super().encode(images, question, policy)

    one = replace(
        example(picture((100, 20, 140, 40))),
        teacher_question="what in the crop?",
        teacher_images=(picture(),),
    )
    (found,), _ = located("tiles", looker(encoder=Records()), [one])
    assert found.boxes == (Box(100, 20, 140, 40),)
    assert Records.seen == [("where", "student")] + [("where", "teacher")] * 83


def said(text, *examples, kind="qwen3_vl", **vision):
    encoder = GridEncoder()
    encoder.said = text
    config = {"model_type": kind, "vision_config": vision}
    return located("grounding", looker(encoder=encoder, config=config), examples)[0]


def test_grounding_reads_each_familys_form():
    text = '```json\n[{"bbox_2d": [250, 500, 500, 750], "label": "it"}]\n```'
    (one,) = said(text, example(picture()))
    assert one.boxes == (Box(40, 40, 80, 60),)
    assert one.confidence == pytest.approx(0.1)  # the planted probability of every token
    assert said(text, example(picture()), kind="qwen3_5")[0].boxes == one.boxes
    (two,) = said("it(250,500),(500,750)", example(picture()), kind="qwen2_vl")
    assert two.boxes == one.boxes
    # 8 tokens of 28 pixels across: 224 x 224 resized pixels
    text = '{"bbox_2d": [56, 112, 112, 168]}'
    (three,) = said(text, example(picture()), kind="qwen2_5_vl")
    assert three.boxes == one.boxes
    (four,) = said(text, example(picture()), kind="qwen2_5_vl", patch_size=28)
    assert four.boxes == (Box(20, 20, 40, 30),)


def test_grounding_asks_about_each_image():
    text = '{"bbox_2d": [250, 500, 500, 750]}'
    red, black = picture((0, 0, 160, 80)), picture()
    for images in ((red, black), (black, red)):
        (one,) = said(text, example(*images, question="<image> or <image>"))
        # The redder is the more certain.
        assert one.boxes == (Box(40, 40, 80, 60, image=images.index(red)),)
        assert one.confidence == pytest.approx(1)


def test_grounding_refuses_a_family_whose_form_is_not_known():
    with pytest.raises(ModelError, match="models of type 'gemma3' write a box is not known"):
        said("", example(picture()), kind="gemma3")


def test_every_box_of_an_answer_is_read_once():
    text = '[{"bbox_2d": [0, 0, 500, 500]}, {"bbox_2d": [0, 0, 500, 500]}, {"bbox_2d": [1, 1, 9, 9]'
    assert grounding.parse(text, "per-mille", (100, 100), (0, 0)) == (
        Box(0, 0, 50, 50),
        Box(0.1, 0.1, 0.9, 0.9),
    )


@pytest.mark.parametrize("by", ["attention", "tiles", "grounding"])
def test_a_row_that_cannot_be_used_is_skipped_and_named(by, tmp_path):
    (tmp_path / "no.png").write_bytes(b"no")
    given = [example(tmp_path / "no.png", name="bad"), example(picture((40, 20, 80, 40)), name="b")]
    found, skipped = located(by, looker(Looks()), given)
    assert len(found) == 1
    assert list(skipped.reasons) == ["bad"]


def test_pictures_of_all_modes_are_read():
    grey = Image.new("L", (160, 80))
    assert located("tiles", looker(), [example(grey)])[0][0].boxes == ()
