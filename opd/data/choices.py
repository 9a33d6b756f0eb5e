"""The choices of a multiple-choice question: adds them to its text, unless the text lists them, and
finds them in a text that does."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase as LETTERS  # noqa: N812
from typing import Any

from opd.data.answers import without_letters
from opd.data.fields import show
from opd.errors import DataError
from opd.types import IMAGE_MARKER

LONG = 12
"""From this many characters on, a choice's text does not occur in a question by chance."""

_BETWEEN = re.compile(
    r"(?:[\W_]|\b[A-Za-z0-9]\b|\b(?:and|or|the|an|option|choice|answer|vs|versus)\b)*"
)
"""Matches the text between two choices of a list: punctuation, single letters and digits, and
conjunctions."""

_LETTERED = r"(?:^|\n)\s*[*_(\[]*{letter}\s*[\])*_]*[.):\]]"

_OPTION = re.compile(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(\S.*)")
"""A line that is an option: "A. red", "A) red", "A: red" or "(A) red"."""

_FIRST = re.compile(r"(?:^|[?:.!\n])[^\S\n]*(?=\(A\)|A[.):]\s)")
"""The place before the first of several options on one line, which begins a sentence."""

_MARKS = (re.compile(r"\(([A-Z])\)"), re.compile(r"(?<![\w(])([A-Z])[.):](?=\s)"))
"""The two ways of setting a letter off: "(A)", and "A.", "A)" or "A:"."""

_REQUEST = re.compile(
    r"\s+(?:Please\s|Answer\b|Select\b|Choose\b|Respond\b|Reply\b|Give\b|Output\b)"
    r"(?=.*\b(?:letter|option|choice|answer)s?\b).*",
    re.IGNORECASE,
)
"""A request such as "Answer with the option's letter", behind the last option."""

_QUOTED = re.compile(r"""\s*(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")\s*,?\s*""", re.DOTALL)
"""An entry of a list of texts in Python's notation."""

LONGEST = 100_000
"""Characters up to which a text is searched for options."""

STARTS = 10
"""Places that are tried as the first of several options on one line."""

LONG_OPTION = 2_000
"""Characters up to which the last option of a line is read."""


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question, followed by a line for each choice ("A. red"); the question alone if it
    `holds` the choices."""
    if not choices or holds(question, choices):
        return question
    texts = without_letters(choices)
    lines = (
        f"{letter}. {' '.join(text.split())}" for letter, text in zip(LETTERS, texts, strict=False)
    )
    return "\n".join([question.rstrip(), *lines])


def holds(question: str, choices: Sequence[str]) -> bool:
    """Whether a question lists its choices.

    It does if it contains the texts of all choices as a list ("red, blue or green?", "A. red B.
    blue"), or anywhere if all are long; if lines of the question begin with the letters of all
    choices, or `options_in` finds them; and if the choices are only letters, which then refer to
    the image.
    """
    letters = LETTERS[: len(choices)]
    if [_plain(choice).strip("().:[] ") for choice in choices] == list(letters.lower()):
        return True
    if len(choices) > 1 and all(
        re.search(_LETTERED.format(letter=letter), question) for letter in letters
    ):
        return True
    if options_in(question) == without_letters(choices):
        return True
    said, texts = _plain(question), [_plain(text) for text in without_letters(choices)]
    places = _places(said, texts)
    if places is None:
        return False
    if all(len(text) >= LONG for text in texts):
        return True
    return all(_BETWEEN.fullmatch(said, end, start) for (_, end), (start, _) in pairwise(places))


def _plain(text: str) -> str:
    """The text in lower case, with single spaces and compatible Unicode forms."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _places(said: str, texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """(start, end) of each text in `said`, as whole words and without overlaps, in ascending order;
    None if a text is missing.

    Long texts are searched first. The last match counts, since choices stand at the end of a
    question.
    """
    places: list[tuple[int, int]] = []
    for text in sorted(texts, key=len, reverse=True):
        spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
        free = [
            (start, end)
            for start, end in spans
            if all(end <= left or start >= right for left, right in places)
        ]
        if not free:
            return None
        places.append(free[-1])
    return sorted(places)


def options_in(question: Any) -> list[str]:
    """The texts of options that stand in a question, with the letters A, B, ... in order; empty if
    there are fewer than two.

    Options stand on lines of their own, or on one line after the end of a sentence: "Which? (A) red
    (B) blue". A request behind the last option is none of its text.
    """
    if not isinstance(question, str) or len(question) > LONGEST:
        return []
    text = question.replace(IMAGE_MARKER, "\n")
    found = _options_on_lines(text)
    return found if len(found) > 1 else _options_on_one_line(text)


def with_options(question: Any) -> dict[str, Any]:
    """The fields question and choices of a question that may hold its options."""
    choices = options_in(question)
    return {"question": question, **({"choices": choices} if choices else {})}


def listed_texts(field: str, value: Any) -> Any:
    """A list of texts that may be written as a text in JSON's or Python's notation, which is parsed
    here and never evaluated. Raises DataError for another text."""
    if not isinstance(value, str):
        return value
    texts, place, inner = [], 0, value.strip()
    if inner[:1] + inner[-1:] in ("[]", "()") and len(inner) <= LONGEST:
        inner = inner[1:-1]
        while match := _QUOTED.match(inner, place):
            quoted = match[1] if match[1] is not None else match[2]
            texts.append(re.sub(r"\\(.)", _unescaped, quoted, flags=re.DOTALL))
            place = match.end()
        if texts and place == len(inner):
            return texts
    raise DataError(f"field '{field}': {show(value)} is not a list of texts")


def _unescaped(escape: re.Match[str]) -> str:
    """The character that an escape such as \\n or \\' stands for."""
    return {"n": "\n", "t": "\t", "r": "\r"}.get(escape[1], escape[1])


def _options_on_lines(question: str) -> list[str]:
    """The texts of the last lines that are options, with the letters A, B, ... in order."""
    texts: list[str] = []
    for line in question.splitlines():
        match = _OPTION.fullmatch(line.strip())
        letter = (match[1] or match[2]) if match else ""
        if match and letter == LETTERS[len(texts) : len(texts) + 1]:
            texts.append(match[3])
        elif match and letter == "A":
            texts = [match[3]]
    return texts


def _options_on_one_line(question: str) -> list[str]:
    """The texts of options that follow each other, from the last "A" that begins a sentence."""
    starts = [match.end() for match in _FIRST.finditer(question)]
    for marks in _MARKS:
        for start in reversed(starts[-STARTS:]):
            texts = _options_from(question, start, marks) if marks.match(question, start) else []
            if len(texts) > 1 and all(texts):
                return texts
    return []


def _options_from(question: str, start: int, marks: re.Pattern[str]) -> list[str]:
    """The texts behind the letters A, B, ... from `start` on."""
    spans: list[tuple[int, int]] = []
    for match in marks.finditer(question, start):
        if match[1] == LETTERS[len(spans) : len(spans) + 1]:
            spans.append(match.span())
    ends = [start for start, _ in spans[1:]] + [len(question)]
    texts = [question[start:end] for (_, start), end in zip(spans, ends, strict=True)]
    texts[-1] = _REQUEST.sub("", texts[-1].strip().split("\n")[0][:LONG_OPTION])
    return [_without_conjunction(text) for text in texts]


def _without_conjunction(text: str) -> str:
    """An option without what leads to the next one: a comma, "or", "and"."""
    text = text.strip(" \t\n,;")
    return text.removesuffix(" or").removesuffix(" and").strip(" \t\n,;")
