"""A question as the two policies are asked it: options below it, and all crops of an image at its
marker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opd.data.choices import holds, with_choices
from opd.prompts.encoder import content
from opd.types import Box, Example
from opd.views.images import teacher_images
from opd.views.questions import student_question, teacher_question
from opd.views.usable import encode_student, encode_teacher
from opd.views.view import ViewOptions

COLOURS = ("red", "dark red", "blue")
EACH = ViewOptions(boxes="each", margin=0, min_size=1)


@pytest.mark.parametrize(
    ("question", "choices", "expected"),
    [
        ("Which colour?", COLOURS, "Which colour?\nA. red\nB. dark red\nC. blue"),
        ("Which colour?\n", ("A. red", "B. blue"), "Which colour?\nA. red\nB. blue"),
        ("Which colour?", ("(A) red", "(B) blue"), "Which colour?\nA. red\nB. blue"),
        ("Which?", ("two\nlines", "x"), "Which?\nA. two lines\nB. x"),
        # Texts that stand in the question by chance are no options.
        (
            "Is the red car left of the blue one?",
            ("red", "blue"),
            "Is the red car left of the blue one?\nA. red\nB. blue",
        ),
        (
            "Which of the 2 cats in image 1 is larger?",
            ("1", "2"),
            "Which of the 2 cats in image 1 is larger?\nA. 1\nB. 2",
        ),
        (
            "Which is reddish or bluer?",
            ("red", "blue"),
            "Which is reddish or bluer?\nA. red\nB. blue",
        ),
        ("Which? A. red", ("red", "blue"), "Which? A. red\nA. red\nB. blue"),
        ("Which?", (), "Which?"),
    ],
)
def test_options_are_put_below_a_question_without_them(
    question: str, choices: tuple[str, ...], expected: str
) -> None:
    assert with_choices(question, choices) == expected
    assert with_choices(expected, choices) == expected


@pytest.mark.parametrize(
    ("question", "choices"),
    [
        ("Which?\nA. red\nB. dark red\nC. blue", COLOURS),
        ("Which? (A) red (B) dark red (C) blue", COLOURS),
        ("Which?\nA) Red\nB) DARK  RED\nC) Blue\nAnswer with the letter.", COLOURS),
        ("Which? **A.** red, **B.** dark red, **C.** blue", COLOURS),
        ("Which? Option A: red; Option B: dark red; Option C: blue", COLOURS),
        ("Which? 1. red 2. dark red 3. blue", COLOURS),
        ("Is it red, blue or dark red?", COLOURS),
        ("Is it red or blue?", ("blue", "red")),
        ("Which is larger: the cat or the dog?", ("cat", "dog")),
        ("\uff21. red \uff22. blue", ("red", "blue")),
        ("Which?\n- red\n- blue", ("red", "blue")),
        ("Is it so: yes or no?", ("yes", "no")),
        (
            "Which is right? First: the cat sits on a mat. Second: the dog sits on a mat.",
            ("the cat sits on a mat", "the dog sits on a mat"),
        ),
        ("Which?\nA. pear\nB. fig", ("A", "B")),
        ("Which letter is on the sign?", ("A", "B", "C", "D")),
        ("Which?\nA. a pear\nB. a fig", ("pears", "figs")),  # two lists would contradict each other
    ],
)
def test_a_question_that_holds_its_options_stays_as_it_is(
    question: str, choices: tuple[str, ...]
) -> None:
    assert holds(question, choices)
    assert with_choices(question, choices) == question


def test_student_and_teacher_are_asked_with_the_same_options() -> None:
    one = Example(
        "a",
        (Image.new("RGB", (20, 20)),),
        "<image>Which?",
        (Box(0, 0, 9, 9),),
        choices=("red", "blue"),
    )
    assert student_question(one) == teacher_question(one, EACH) == "<image>Which?\nA. red\nB. blue"
    other = Example(
        "a",
        one.images,
        "Which?",
        one.boxes,
        teacher_question="What colour?",
        choices=("red", "blue"),
    )
    assert teacher_question(other, EACH) == "What colour?\nA. red\nB. blue"


class Heard:
    """Writes down what is encoded, as the parts of the user's turn."""

    def __init__(self) -> None:
        self.turns: list[list[str]] = []
        self.sizes: list[tuple[int, int]] = []

    def encode(self, images: list[Image.Image], question: str, policy: str = "student") -> None:
        parts = content(question, len(images))
        left = iter(images)
        self.turns.append(
            [str(next(left).size) if part["type"] == "image" else part["text"] for part in parts]
        )


@pytest.mark.parametrize(
    ("question", "boxes", "expected"),
    [
        ("Is <image> like <image>?", "AAB", ["Is ", "A1", "A2", " like ", "B1", "?"]),
        ("Is <image> like <image>?", "ABB", ["Is ", "A1", " like ", "B1", "B2", "?"]),
        ("Is <image> like <image>?", "AABB", ["Is ", "A1", "A2", " like ", "B1", "B2", "?"]),
        ("Is <image> like <image>?", "B", ["Is ", "A", " like ", "B1", "?"]),
        ("Is <image> like it?", "AAB", ["Is ", "A1", "A2", "B1", " like it?"]),
        ("Are they alike?", "AAB", ["A1", "A2", "B1", "Are they alike?"]),
    ],
)
def test_crops_of_an_image_stand_at_its_marker(
    question: str, boxes: str, expected: list[str]
) -> None:
    images = {"A": Image.new("RGB", (100, 50)), "B": Image.new("RGB", (200, 50))}
    sizes = {
        "A": "(100, 50)",
        "B": "(200, 50)",
        "A1": "(11, 5)",
        "A2": "(12, 5)",
        "B1": "(21, 5)",
        "B2": "(22, 5)",
    }
    found = []
    for place, letter in enumerate(boxes):
        width = 10 + boxes[: place + 1].count(letter) + (10 if letter == "B" else 0)
        found.append(Box(0, 0, width, 5, "AB".index(letter)))
    one = Example("a", tuple(images.values()), question, tuple(found))
    encoder = Heard()
    encode_teacher(encoder, one, EACH)  # type: ignore[arg-type]
    assert encoder.turns == [[sizes.get(part, part) for part in expected]]
    encode_student(encoder, one)  # type: ignore[arg-type]
    assert encoder.turns[1].count("(100, 50)") == encoder.turns[1].count("(200, 50)") == 1


def test_one_crop_an_image_and_given_images_keep_the_markers() -> None:
    images = (Image.new("RGB", (100, 50)), Image.new("RGB", (200, 50)))
    boxes = (Box(0, 0, 9, 9), Box(9, 9, 19, 19), Box(0, 0, 9, 9, 1))
    one = Example("a", images, "Is <image> like <image>?", boxes)
    assert teacher_question(one, ViewOptions()) == one.question
    assert teacher_question(one, EACH.model_copy(update={"kind": "full"})) == one.question
    given = Example("a", images, one.question, boxes, teacher_images=images)
    assert teacher_question(given, EACH) == one.question
    wrong = EACH.model_copy(update={"kind": "wrong"})
    assert len(teacher_images(given, wrong)) == 3
    assert teacher_question(given, wrong) == "Is <image><image> like <image>?"


def test_no_crop_is_enlarged_above_what_the_processor_keeps(random_model: Path) -> None:
    from opd.prompts.encoder import PromptEncoder

    seen = []

    class Seeing(PromptEncoder):
        def encode(self, images: Any, *rest: Any) -> Any:
            seen.extend(image.size for image in images)
            return super().encode(images, *rest)

    encoder = Seeing(random_model, max_pixels=32 * 32 * 4, teacher_max_pixels=32 * 32 * 16)
    assert (encoder.max_pixels("student"), encoder.max_pixels("teacher")) == (4096, 16384)
    one = Example("a", (Image.new("RGB", (400, 400)),), "?", (Box(0, 0, 60, 60),))
    encode_teacher(encoder, one, ViewOptions(margin=0, enlarge=16))
    assert seen == [(128, 128)]
