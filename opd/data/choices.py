"""Adds the choices of a multiple-choice question to its text, unless the text lists them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase as LETTERS  # noqa: N812

from opd.data.answers import without_letters

LONG = 12
"""From this many characters on, a choice's text does not occur in a question by chance."""

_BETWEEN = re.compile(
    r"(?:[\W_]|\b[A-Za-z0-9]\b|\b(?:and|or|the|an|option|choice|answer|vs|versus)\b)*"
)
"""Matches the text between two choices of a list: punctuation, single letters and digits, and
conjunctions."""

_LETTERED = r"(?:^|\n)\s*[*_(\[]*{letter}\s*[\])*_]*[.):\]]"


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
    choices; and if the choices are only letters, which then refer to the image.
    """
    letters = LETTERS[: len(choices)]
    if [_plain(choice).strip("().:[] ") for choice in choices] == list(letters.lower()):
        return True
    if len(choices) > 1 and all(
        re.search(_LETTERED.format(letter=letter), question) for letter in letters
    ):
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
