"""The options of a question: whether its text holds them, and its text with them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from itertools import pairwise
from string import ascii_uppercase as LETTERS  # noqa: N812

from opd.data.answers import without_letters

LONG = 12
"""Characters from which an option's text does not stand in a question by chance."""

_BETWEEN = re.compile(
    r"(?:[\W_]|\b[A-Za-z0-9]\b|\b(?:and|or|the|an|option|choice|answer|vs|versus)\b)*"
)
"""What may stand between two options of a list: signs, single letters and digits, and words that
join."""

_LETTERED = r"(?:^|\n)\s*[*_(\[]*{letter}\s*[\])*_]*[.):\]]"


def with_choices(question: str, choices: Sequence[str]) -> str:
    """The question, and below it one line for each option ("A. red"), unless it holds the options;
    see `holds`."""
    if not choices or holds(question, choices):
        return question
    texts = without_letters(choices)
    lines = (
        f"{letter}. {' '.join(text.split())}" for letter, text in zip(LETTERS, texts, strict=False)
    )
    return "\n".join([question.rstrip(), *lines])


def holds(question: str, choices: Sequence[str]) -> bool:
    """Whether a question holds its options.

    It does where all their texts stand in it as a list ("red, blue or green?", "A. red B. blue"),
    or, if all are long, anywhere; where lines of it begin with all their letters; and where the
    options are nothing but letters, which stand in the image.
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
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _places(said: str, texts: Sequence[str]) -> list[tuple[int, int]] | None:
    """Where each text stands in whole words, in order of place; None where one is missing.

    The longest texts are looked for first, from the end of the question on, where options stand.
    """
    places: list[tuple[int, int]] = []
    for text in sorted(texts, key=len, reverse=True):
        found = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", said)]
        free = [
            (start, end)
            for start, end in found
            if all(end <= left or start >= right for left, right in places)
        ]
        if not free:
            return None
        places.append(free[-1])
    return sorted(places)
