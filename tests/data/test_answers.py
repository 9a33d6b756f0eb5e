"""Predictions against reference answers, with what is expected written out."""

from __future__ import annotations

from dataclasses import asdict
from decimal import Decimal
from pathlib import Path

import pytest

from opd.data.answers import chosen, matches, normal, number
from opd.measure.gap import Answered, accuracies, judge
from opd.run.folder import RunFolder
from opd.types import Example
from opd_cli import tables

ANIMALS = ("cat", "dog", "cow", "horse")
COLOURS = ("red", "dark red", "blue")


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        # Word for word, after normalisation.
        ("The red tile shows 7.", "The red tile shows 7.", True),
        ("the red  tile shows 7", "The red tile shows 7.", True),
        ("The red tile shows 1.", "The red tile shows 7.", False),
        ("The blue tile shows 7.", "The red tile shows 7.", False),
        ("7", "The red tile shows 7.", False),
        ("The red tile shows 77.", "The red tile shows 7.", False),
        ("A Stop sign!", "stop sign", True),
        ("stop\n sign", "stop sign", True),
        ("stopsign", "stop sign", False),
        ("don't walk", "Don\u2019t walk", True),
        ("well-known", "well known", True),
        ("Cafe\u0301", "caf\u00e9", True),
        ("cafe", "caf\u00e9", False),
        ("\uff28\uff25\uff2c\uff2c\uff2f", "hello", True),
        ("Stra\u00dfe", "STRASSE", True),
        ("\u7ea2\u8272\u3002", "\u7ea2\u8272", True),
        ("Answer: red", "red", True),
        ("The answer is red.", "red", True),
        ("**Answer:** red", "red", True),
        ("It is **not** blue. **Answer**: red", "red", True),
        ("not red", "red", False),
        ("The", "A", False),
        ("A", "A", True),
        ("", "red", False),
        ("?", "?", True),
        ("!", "?", False),
        ("<think>It may be blue.</think>\n\nred", "red", True),
        ("<think>red</think>blue", "red", False),
        # Numbers, by value.
        ("The red tile shows 7.", "7", True),
        ("The red tile shows 1.", "7", False),
        ("7.0", "7", True),
        ("1000", "1,000", True),
        ("about 1,000 people", "1000", True),
        ("1,0", "10", False),
        ("-5", "5", False),
        ("\u22125", "-5", True),
        (".5", "0.5", True),
        ("0.25", "0.2", False),
        ("50", "50%", True),
        ("It costs $3.50.", "3.5", True),
        ("3 red and 4 blue make 7", "7", True),
        ("The answer is 7, not 8", "8", True),
        ("7 or 8", "8", False),
        ("Bus B52", "52", False),
        ("12:30", "30", False),
        ("2019-05-07", "7", False),
        ("7-8", "8", False),
        ("x=7", "7", True),
        ("\\boxed{7}", "7", True),
        ("There are seven tiles.", "7", True),
        ("7", "seven", True),
        ("The one on the left.", "1", False),
        ("One.", "1", True),
        ("two of the seven", "7", False),
        ("7cm", "7", True),
        ("\uff17", "7", True),
        ("no digit", "7", False),
        # Yes and no, by the first word.
        ("Yes, there is a dog.", "yes", True),
        ("No.", "yes", False),
        ("Yesterday", "yes", False),
        ("Maybe, but I would not say yes.", "yes", False),
        ("It is yes, or it is no", "no", False),
    ],
)
def test_without_choices(prediction: str, answer: str, expected: bool) -> None:
    assert matches(prediction, answer) is expected


@pytest.mark.parametrize(
    ("prediction", "answer", "choices", "expected"),
    [
        ("Answer: D", "D", ANIMALS, "D"),
        ("(B)", "B", ANIMALS, "B"),
        ("B.", "B", ANIMALS, "B"),
        ("b", "B", ANIMALS, "B"),
        ("**B**", "B", ANIMALS, "B"),
        ("[B]", "B", ANIMALS, "B"),
        ("B) dog", "B", ANIMALS, "B"),
        ("B: dog", "B", ANIMALS, "B"),
        ("B\nbecause it barks", "B", ANIMALS, "B"),
        ("The answer is C", "C", ANIMALS, "C"),
        ("The answer is (C).", "C", ANIMALS, "C"),
        ("the correct option is c.", "C", ANIMALS, "C"),
        ("**Answer: C**", "C", ANIMALS, "C"),
        ("Answer: D because it neighs", "D", ANIMALS, "D"),
        ("Answer: A because it purrs", "A", ANIMALS, "A"),
        ("A cat and a dog are there. Answer: B", "B", ANIMALS, "B"),
        ("The answer is B. No, the answer is C.", "C", ANIMALS, "C"),
        ("I think it is B.", "B", ANIMALS, "B"),
        ("It must be A.", "A", ANIMALS, "A"),
        ("\\boxed{B}", "B", ANIMALS, "B"),
        ("<think>A?</think>B", "B", ANIMALS, "B"),
        ("A dog", "B", ANIMALS, "B"),
        ("a", "A", ANIMALS, "A"),
        ("The answer is a dog", "B", ANIMALS, "B"),
        ("The answer is A dog", "B", ANIMALS, "B"),
        ("Dog.", "B", ANIMALS, "B"),
        ("The animal is a dog.", "B", ANIMALS, "B"),
        ("dog", "dog", ANIMALS, "B"),
        ("B", "dog", ANIMALS, "B"),
        ("dark red", "B", COLOURS, "B"),
        ("The car is dark red.", "B", COLOURS, "B"),
        ("The car is red.", "A", COLOURS, "A"),
        ("B. red", "B", COLOURS, "B"),
        ("blue", "C", ("A. red", "B. dark red", "C. blue"), "C"),
        ("(2)", "B", ("1", "2", "3"), "B"),
    ],
)
def test_a_choice_is_found_and_no_other_choice_is_right(
    prediction: str, answer: str, choices: tuple[str, ...], expected: str
) -> None:
    right = "ABCD".index(expected)
    assert chosen(answer, choices) == right
    assert matches(prediction, answer, choices)
    for other in "ABCD"[: len(choices)].replace(expected, ""):
        assert not matches(prediction, other, choices)


@pytest.mark.parametrize(
    "prediction",
    [
        "A bird",
        "",
        "A or B",
        "Answer: B or C",
        "a cat or a dog",
        "E",
        "Answer: E",
        "I do not know.",
        "It is not a dog but a cat",
        "catalogue",
        "Abcd",
    ],
)
def test_no_choice_is_right_where_the_prediction_settles_on_none(prediction: str) -> None:
    assert not any(matches(prediction, letter, ANIMALS) for letter in "ABCD")


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("B", ANIMALS, 1),
        ("(b)", ANIMALS, 1),
        ("Dog", ANIMALS, 1),
        ("B. dog", ANIMALS, 1),
        ("B. cat", ANIMALS, None),
        ("bird", ANIMALS, None),
        ("E", ANIMALS, None),
        ("dark red", COLOURS, 1),
        ("red", ("A. red", "B. blue"), 0),
        # Where choices are letters themselves, a letter means the choice's letter.
        ("A", ("C", "B", "A"), 0),
    ],
)
def test_reference_answers_name_a_choice(
    answer: str, choices: tuple[str, ...], expected: int | None
) -> None:
    assert chosen(answer, choices) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Quick, brown FOX!", "quick brown fox"),
        ("the", "the"),
        ("1,000.50 dollars.", "1000.50 dollars"),
        ("3 - 5", "3 5"),
        ("-5", "-5"),
        ("...", ""),
    ],
)
def test_normal_forms(text: str, expected: str) -> None:
    assert normal(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7", 7),
        ("1,234.5 m", "1234.5"),
        ("1,23", None),
        ("7 or 7.0", 7),
        ("7 to 8", None),
        ("first 3, then 4", 4),
        ("twelve", 12),
        ("", None),
    ],
)
def test_numbers_in_texts(text: str, expected: int | str | None) -> None:
    assert number(text) == (None if expected is None else Decimal(expected))


@pytest.mark.parametrize(
    ("prediction", "answers", "choices", "expected"),
    [
        ("It is green.", ("grey", "It is green"), (), True),
        ("7.0", ["seven", "8"], (), True),
        ("blue", ("green", "Green"), (), False),
        ("B", ("A", "dog"), ANIMALS, True),
        ("C", ("A", "dog"), ANIMALS, False),
        ("green", (), (), False),
    ],
)
def test_any_of_several_reference_answers_is_right(
    prediction: str, answers: tuple[str, ...], choices: tuple[str, ...], expected: bool
) -> None:
    assert matches(prediction, answers, choices) is expected


def test_several_reference_answers_are_shown_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    example = Example("a", (), "Which?", answer=("green", "lime"))
    judged = judge(0, example, "lime", "blue")
    assert (judged.answer, judged.full_right, judged.crop_right) == (("green", "lime"), True, False)
    RunFolder(tmp_path).append("answers.jsonl", asdict(judged))
    (again,) = RunFolder(tmp_path).rows("answers.jsonl")
    assert Answered(**again).answer == ["green", "lime"]
    assert accuracies([Answered(**again)])["full_accuracy"] == 1
    tables.answers([("Which?", judged)])
    assert "green | lime" in capsys.readouterr().out
