"""Compares a prediction with the reference answer by fixed rules; used only for measuring.

With choices, the prediction must settle on the right choice. Otherwise the normalised texts must be
equal; numbers are also compared by value, and yes or no by the prediction's first word. A
prediction that hedges ("B or C", "7 or 8") is wrong.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from string import ascii_uppercase as LETTERS  # noqa: N812

ARTICLES = frozenset({"a", "an", "the"})
SPELT = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
NUMBER_WORDS = {word: Decimal(value) for value, word in enumerate(SPELT)}

_CUE = re.compile(r"\b(?:answer|option|choice)\b\s*(?:is|was|:|=)+\s*", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{(?:\\text\{)?([^{}]*)\}*")
_NUMBER = re.compile(r"([-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\.\d+)(?:%|°|[a-z]{1,3})?")
_HEDGE = re.compile(r"\W*(?:\bor\b|\band\b|/|,|&)\W*([A-Z])\b")
_ALONE = re.compile(rf"\s*(?:[^\w\s]|$)|{_HEDGE.pattern}")
_REASON = re.compile(r"\s+(?:because|since|as|is|which|for|and)\b")


def matches(prediction: str, answer: str | Sequence[str], choices: Sequence[str] = ()) -> bool:
    """Whether `prediction` gives the reference `answer`, or one of several. With `choices`, an
    answer is the letter or the text of a choice."""
    if not isinstance(answer, str):
        return any(matches(prediction, reference, choices) for reference in answer)
    said = _final(prediction)
    if choices:
        right = chosen(answer, choices)
        return right is not None and settled(said, choices) == right
    wanted = normal(answer)
    if not wanted:
        return said.strip() == answer.strip()
    for part in (said, _after_cue(said)):
        if normal(part) == wanted:
            return True
    value = number(answer) if _is_number(answer) else None
    if value is not None:
        predicted = number(_after_cue(said))
        return value == (number(said) if predicted is None else predicted)
    return wanted in {"yes", "no"} and normal(said).split()[:1] == [wanted]


def normal(text: str) -> str:
    """The text without differences in case, punctuation, articles, white space and Unicode forms;
    decimal points and minus signs stay."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['\u2019`]", "", text)
    characters = []
    for place, character in enumerate(text):
        is_mark = unicodedata.category(character).startswith("M")
        stays = character.isalnum() or is_mark or _in_number(text, place)
        characters.append(character if stays else " ")
    words = "".join(characters).split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


def number(text: str) -> Decimal | None:
    """The last number of a text; None if there is none, or if the text hedges between two.

    The last number counts because reasoning comes before the result ("3 red and 4 blue make 7").
    Dates, times, ranges and codes ("B52") are not numbers. A number word counts if it is the only
    one and the text has no digits; "one" counts only alone, since it is mostly a pronoun.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    words = [
        (
            word.strip("*_`\"'()[]{}<>#~.,;:!?$€£¥\\")
            if not re.fullmatch(r"[-+]?\.\d+", word)
            else word
        )
        for word in text.replace("=", " ").split()
    ]
    numbers = [
        (place, Decimal(match[1].replace(",", "")))
        for place, word in enumerate(words)
        if (match := _NUMBER.fullmatch(word))
    ]
    if not numbers:
        spelt = [word for word in words if word in NUMBER_WORDS]
        if len(spelt) != 1 or (spelt == ["one"] and normal(text) != "one"):
            return None
        return NUMBER_WORDS[spelt[0]]
    place, value = numbers[-1]
    if len(numbers) > 1:
        place_before, value_before = numbers[-2]
        joined = place - place_before == 2 and words[place - 1] in {"or", "to"}
        if joined and value != value_before:
            return None
    return value


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a reference answer names, by letter or by text; None if it names
    none."""
    letter = re.fullmatch(r"\W*([A-Za-z])\W*", answer)
    if letter and (place := LETTERS.index(letter[1].upper())) < len(choices):
        return place
    lead = _leading_letter(answer, len(choices))
    texts = _texts(choices)
    wanted = normal(answer)
    if wanted in texts:
        return texts.index(wanted)
    return lead if lead is not None and normal(answer).endswith(texts[lead]) else None


def settled(said: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a prediction settles on; None if it names none or several.

    The first rule that applies decides: the letter after the last "answer is" or similar words; a
    letter at the beginning that is set off ("B.", "(B) red"); a choice's text that is the whole
    prediction, or the only choice that is mentioned; a capital letter that stands alone. "A" before
    a word is an article.
    """
    cued = _after_cue(said)
    texts = _texts(choices)
    if cued != said:
        letter = re.match(r"\W*([A-Za-z])(?!\w)", cued)
        if letter and _is_letter(letter[1], cued[letter.end() :]):
            return _index(letter[1], cued[letter.end() :], len(choices))
    for part in (said, cued):
        lead = _leading_letter(part, len(choices))
        if lead is not None:
            return lead
        if normal(part) in texts:
            return texts.index(normal(part))
    mentioned = _mentioned(normal(cued), texts)
    if mentioned:
        return mentioned.pop() if len(mentioned) == 1 else None
    alone = {
        match[1]
        for match in re.finditer(r"(?<![\w'])([A-Z])(?![\w'])", said)
        if match[1] in LETTERS[: len(choices)]
        and (match[1] not in "AI" or _ALONE.match(said[match.end() :]))
    }
    return LETTERS.index(alone.pop()) if len(alone) == 1 else None


def _leading_letter(said: str, count: int) -> int | None:
    """Index of the choice whose letter begins the text, alone or set off from the rest; None if
    there is no such letter. `count`: number of choices."""
    match = re.match(
        r"\s*[*_\"'`]*(?:[(\[]\s*([A-Za-z])\s*[)\]]|([A-Za-z])(?:\s*[.):,\]*\"'`]|\s*$|\s*\n))",
        said,
    )
    if not match:
        return None
    return _index(
        match[1] or match[2], said[match.end() :] if match[1] else said[match.end(2) :], count
    )


def _index(letter: str, rest: str, count: int) -> int | None:
    """Index of a letter among `count` choices; None if it is not one of them, or if `rest` hedges
    with another choice."""
    hedge = _HEDGE.match(rest)
    place = LETTERS.index(letter.upper())
    return None if place >= count or (hedge and LETTERS.index(hedge[1]) < count) else place


def _is_letter(letter: str, rest: str) -> bool:
    """Whether a letter with the text `rest` after it names a choice. A letter before a word does
    only if it is a capital ("A" and "I" only before a reason), or if a hedge follows."""
    followed = re.match(r"\s+\w", rest) is not None
    return (
        not followed
        or (letter.isupper() and (letter not in "AI" or _REASON.match(rest) is not None))
        or _HEDGE.match(rest) is not None
    )


def _mentioned(said: str, texts: Sequence[str]) -> set[int]:
    """Indices of the choices whose text occurs in `said` as whole words, and not only inside a
    longer choice ("red" in "dark red")."""
    remaining = f" {said} "
    mentioned = set()
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place]), reverse=True):
        if texts[place] and f" {texts[place]} " in remaining:
            mentioned.add(place)
            remaining = remaining.replace(f" {texts[place]} ", " | ")
    return mentioned


def without_letters(choices: Sequence[str]) -> list[str]:
    """The choices without the letter that some data sets put before every choice ("A. red")."""
    stripped = [
        re.fullmatch(rf"\s*[(\[]?{letter}\s*[.):\]]\s*(.+)", choice, re.DOTALL)
        for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    lettered = [match[1] for match in stripped if match]
    return lettered if len(lettered) == len(choices) else list(choices)


def _texts(choices: Sequence[str]) -> list[str]:
    """The normalised texts of the choices."""
    return [normal(choice) for choice in without_letters(choices)]


def _final(prediction: str) -> str:
    """The part of a prediction that counts: the text after a reasoning block, or the last LaTeX box
    in it."""
    said = prediction.rpartition("</think>")[2]
    boxed = _BOXED.findall(said)
    return boxed[-1] if boxed else said


def _after_cue(said: str) -> str:
    """The text after the last "answer is", "Answer:" or similar words; the whole text if there are
    none."""
    # Asterisks of bold text may stand between these words and the colon.
    plain = said.replace("*", "")
    cues = list(_CUE.finditer(plain))
    return plain[cues[-1].end() :] if cues else said


def _is_number(text: str) -> bool:
    """Whether the text is a single number."""
    words = text.strip().casefold().split()
    return len(words) == 1 and number(text) is not None


def _in_number(text: str, place: int) -> bool:
    """Whether the character at `place` is the decimal point or the minus sign of a number."""
    before, after = text[place - 1 : place] if place else "", text[place + 1 : place + 2]
    return after.isdigit() and (
        (text[place] == "." and before.isdigit()) or (text[place] == "-" and not before.isalnum())
    )
