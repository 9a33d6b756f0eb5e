"""Does a prediction say the reference answer? Rules without a judge, used only for measuring.

In order: with choices, the one choice that the prediction settles on; a number, by value; yes or
no, by the first word; everything else word for word after normalisation. A prediction that hedges
("B or C", "7 or 8") is wrong.
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
    """Whether `prediction` says `answer`, which may be the letter or the text of one of `choices`.

    Of several reference answers any is right.
    """
    if not isinstance(answer, str):
        return any(matches(prediction, one, choices) for one in answer)
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
        found = number(_after_cue(said))
        return value == (number(said) if found is None else found)
    return wanted in {"yes", "no"} and normal(said).split()[:1] == [wanted]


def normal(text: str) -> str:
    """Case, punctuation, articles, white space and Unicode forms removed; a decimal point and a
    minus sign stay."""
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))|['\u2019`]", "", text)
    kept = "".join(
        (
            character
            if character.isalnum()
            or unicodedata.category(character).startswith("M")
            or _in_number(text, place)
            else " "
        )
        for place, character in enumerate(text)
    )
    words = kept.split()
    return " ".join([word for word in words if word not in ARTICLES] or words)


def number(text: str) -> Decimal | None:
    """The last number of a text, None where there is none or where it hedges between two.

    The last, because reasoning comes before its result ("3 red and 4 blue make 7"). Dates, times,
    ranges and codes ("B52") are no numbers. A number word counts where the text has no digits and
    one such word; "one" only alone, as it is mostly a pronoun.
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
    found = [
        (place, Decimal(match[1].replace(",", "")))
        for place, word in enumerate(words)
        if (match := _NUMBER.fullmatch(word))
    ]
    if not found:
        spelt = [word for word in words if word in NUMBER_WORDS]
        return (
            NUMBER_WORDS[spelt[0]]
            if len(spelt) == 1 and (spelt != ["one"] or normal(text) == "one")
            else None
        )
    if (
        len(found) > 1
        and found[-1][0] - found[-2][0] == 2
        and words[found[-1][0] - 1] in {"or", "to"}
        and found[-1][1] != found[-2][1]
    ):
        return None
    return found[-1][1]


def chosen(answer: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that a reference answer names, by its letter or else by its text; None
    where it names none."""
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
    """Index of the one choice that a prediction settles on; None where it names none, or several.

    In order: a letter after "answer is" or the like (the last such place), a letter at the
    beginning that is set off ("B.", "(B) red"), a choice's text as the whole or as the only one
    mentioned, a capital letter that stands alone. "A" before a word is an article.
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
    """A letter that is all there is, or that is set off from what follows."""
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
    hedge = _HEDGE.match(rest)
    place = LETTERS.index(letter.upper())
    return None if place >= count or (hedge and LETTERS.index(hedge[1]) < count) else place


def _is_letter(letter: str, rest: str) -> bool:
    """A letter that no word follows; a capital other than "A" and "I" is never a word, and a reason
    may follow any letter."""
    followed = re.match(r"\s+\w", rest) is not None
    return (
        not followed
        or (letter.isupper() and (letter not in "AI" or _REASON.match(rest) is not None))
        or _HEDGE.match(rest) is not None
    )


def _mentioned(said: str, texts: Sequence[str]) -> set[int]:
    """Choices whose text occurs in whole words, without those that occur only inside a longer one
    ("red" in "dark red")."""
    left = f" {said} "
    found = set()
    for place in sorted(range(len(texts)), key=lambda place: len(texts[place]), reverse=True):
        if texts[place] and f" {texts[place]} " in left:
            found.add(place)
            left = left.replace(f" {texts[place]} ", " | ")
    return found


def without_letters(choices: Sequence[str]) -> list[str]:
    """The choices without the letters that some data sets put before each of them ("A. red")."""
    stripped = [
        re.fullmatch(rf"\s*[(\[]?{letter}\s*[.):\]]\s*(.+)", choice, re.DOTALL)
        for letter, choice in zip(LETTERS, choices, strict=False)
    ]
    lettered = [match[1] for match in stripped if match]
    return lettered if len(lettered) == len(choices) else list(choices)


def _texts(choices: Sequence[str]) -> list[str]:
    return [normal(choice) for choice in without_letters(choices)]


def _final(prediction: str) -> str:
    """What counts of a prediction: after any reasoning block, and inside a LaTeX box where there is
    one."""
    said = prediction.rpartition("</think>")[2]
    boxed = _BOXED.findall(said)
    return boxed[-1] if boxed else said


def _after_cue(said: str) -> str:
    """What follows the last "answer is", "Answer:" or the like; everything where there is none."""
    # Bold marks would stand between the cue and its colon.
    plain = said.replace("*", "")
    cues = list(_CUE.finditer(plain))
    return plain[cues[-1].end() :] if cues else said


def _is_number(text: str) -> bool:
    words = text.strip().casefold().split()
    return len(words) == 1 and number(text) is not None


def _in_number(text: str, place: int) -> bool:
    before, after = text[place - 1 : place] if place else "", text[place + 1 : place + 2]
    return after.isdigit() and (
        (text[place] == "." and before.isdigit()) or (text[place] == "-" and not before.isalnum())
    )
