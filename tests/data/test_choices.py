"""Options inside a question become choices, and lists of options that are written as texts."""

from __future__ import annotations

import json
from time import perf_counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.data.choices import LONGEST, listed_texts, options_in, with_choices, with_options
from opd.errors import DataError

REQUEST = "Answer with the option's letter from the given choices directly."


@pytest.mark.parametrize(
    ("question", "options"),
    [
        ("Which?\nA. pear\nB. fig\nC. plum\nD. kiwi", ["pear", "fig", "plum", "kiwi"]),
        ("Which?\n(A) red\n(B) dark blue ", ["red", "dark blue"]),
        ("Which?\nA) red\nB) blue\n\nSay the letter.", ["red", "blue"]),
        ("A: red\nB: blue", ["red", "blue"]),
        ("A. first\nno\nA. red\nB. blue", ["red", "blue"]),
        ("Which? (A) red (B) blue", ["red", "blue"]),
        ("Which?\n(A) red (B) dark blue\n" + REQUEST, ["red", "dark blue"]),
        (f"Which? (A) red (B) blue {REQUEST}", ["red", "blue"]),
        ("Which? (A) red (B) blue. Please answer with the letter.", ["red", "blue."]),
        ("Which of these: (A) red, (B) blue or (C) green?", ["red", "blue", "green?"]),
        ("Which? A. red B. blue C. green", ["red", "blue", "green"]),
        ("Which? A) red; B) blue", ["red", "blue"]),
        ("Which?\n(A) Mr. A. Smith (B) Mrs. B. Jones", ["Mr. A. Smith", "Mrs. B. Jones"]),
        ("Which?\nA. red\nB. blue<image>", ["red", "blue"]),
        ("How many? (A) 1 (B) 2\nThere is 1 answer.", ["1", "2"]),
        ("Which?\nA. red", []),
        ("Which?\nA. red\nC. blue", []),
        ("I see A. and B. here", []),
        ("Is panel (A) or panel (B) brighter?", []),
        ("Which? (A) (B)", []),
        ("Plan A. Then B. follows", []),
        ("", []),
        (None, []),
        (3, []),
        (["A. red\nB. blue"], []),
    ],
)
def test_options_are_found_where_they_are_set_off(question: Any, options: list[str]) -> None:
    assert options_in(question) == options
    expected = {"question": question, **({"choices": options} if options else {})}
    assert with_options(question) == expected
    if options:
        assert with_choices(question, options) == question


TEXTS = st.text(st.characters(categories=["L", "N", "P"], include_characters=" "), max_size=20)


@given(
    st.lists(TEXTS, max_size=5), st.sampled_from(["\n{}. ", " ({}) ", "\n({}) ", " {}) "]), TEXTS
)
def test_what_is_found_is_not_written_twice(texts: list[str], mark: str, end: str) -> None:
    options = (mark.format(letter) + text for letter, text in zip("ABCDE", texts, strict=False))
    question = f"Which?{''.join(options)}{end}"
    found = options_in(question)
    assert with_choices(question, found) == question
    assert all(option and option in question for option in found)


@pytest.mark.parametrize(
    "text",
    ["\n", " ", "? ", "A. ", "(A) ", "? (A) ", "(A) x (B) ", "Answer ", "A. x\nB. y\n", "(A)x,"],
)
def test_long_texts_take_no_time(text: str) -> None:
    begin = perf_counter()
    for most in (LONGEST, 2 * LONGEST):
        question = (text * most)[:most]
        assert len(options_in(f"Which? (A) red (B) {question}"[:most])) < 27
        options_in(question)
    assert perf_counter() - begin < 5


@pytest.mark.parametrize(
    "text",
    [
        "['red', 'it\\'s \"blue\"', '(C) [x], y']",
        '["red", "it\'s \\"blue\\"", "(C) [x], y"]',
        "('red', \"it's \\\"blue\\\"\", '(C) [x], y',)",
        "['red' 'it\\'s \"blue\"'\n '(C) [x], y']",
    ],
)
def test_a_list_that_is_written_as_a_text(text: str) -> None:
    assert listed_texts("options", text) == ["red", 'it\'s "blue"', "(C) [x], y"]
    assert listed_texts("options", ["a"]) == ["a"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "['a', b]",
        "['a'",
        "['a'] + ['b']",
        "['a', ['b']]",
        "__import__('os').getcwd()",
        "['a', __import__('os').getcwd()]",
        "[" * 1000,
        "['" + "\\'" * 200_000 + "']",
    ],
)
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"field 'options': .* is not a list of texts"):
        listed_texts("options", text)


@given(st.lists(TEXTS, min_size=1))
def test_any_list_of_texts(texts: list[str]) -> None:
    assert listed_texts("options", repr(texts)) == texts
    assert listed_texts("options", json.dumps(texts, ensure_ascii=False)) == texts
