"""Our own format: JSONL, one example a line, as people write it by hand.

    image or images     path or paths, relative to the file, or the pictures themselves
                        (`opd.data.sources`)
    question            text; `<image>` in it says where an image stands
    boxes               [[left, top, right, bottom], ...], or {"image": 1, "box": [...]} for
                        another image than the first (`opd.data.boxes`)
    box_format          "pixels" (default), "fraction" (0..1 of width and height), "per-mille"
                        (0..1000), "resized" or "padded", each also with "-xywh"; a first line with
                        nothing else says it for the whole file
    box_image           "upright" (default), or "stored": boxes are drawn before EXIF rotation
    box_size            [width, height] of the picture that boxes are drawn on
    teacher_image or teacher_images
                        what the teacher sees, instead of boxes
    teacher_question    what the teacher is asked, if it is something else
    answer              for measuring only; a list: any of them is right; with choices, a letter or
                        the text of a choice
    choices             the options, put into the prompt if the question does not hold them
    id                  file:line by default
    weight              weight of the example in the loss: 1 by default

A message names a field as the file does.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from opd.data import foreign
from opd.data.answers import chosen
from opd.data.boxes import BoxFormat, Drawn, boxes, stated_format, stated_image
from opd.data.choices import with_choices
from opd.data.fields import FIELDS, Row, is_finite, missing, show, text, texts, whole, wrong
from opd.data.picture_store import ImageFacts
from opd.data.remarks import about
from opd.data.sources import Place, Sources
from opd.errors import DataError, plural
from opd.types import IMAGE_MARKER, EncodedImage, Example

LETTERED = len(ascii_uppercase)
"""Largest number of choices, since each has a letter."""

TOGETHER = 4
"""The images of a row, which are in memory together while the prompt is encoded, have at most this
many times `data.max_image_pixels` pixels."""


@dataclass(frozen=True)
class Said:
    """A person's word about all rows of a file; "" where there is none. `box_format` and
    `box_image` as in a row; `question` is asked in rows that have none."""

    box_format: str = ""
    box_image: str = ""
    question: str = ""


NOTHING_SAID = Said()
OURS: Mapping[str, str] = {}


def read_row(
    again: Callable[[], Row],
    source: str,
    files: tuple[Path, ...],
    sources: Sources,
    box_format: BoxFormat,
    facts: Callable[[EncodedImage], ImageFacts],
    max_image_pixels: int,
    said: Said = NOTHING_SAID,
    names: Mapping[str, str] = OURS,
    remark: Callable[[str], None] = lambda _: None,
    evidence: bool = True,
) -> Example:
    """The example of a row. Raises DataError for a faulty row; with `evidence`, a row without boxes
    and teacher's images is faulty.

    `again` reads the row; a picture in the row calls it again when it is opened. `source`:
    "file:line". `files` hold the row. `sources` finds the pictures of the row. `box_format`: the
    unit of boxes if the row does not state one. `facts` reads an image. `max_image_pixels`: larger
    images are refused. `said`: what a person says instead of the row. `names`: what the file calls
    our fields (`with_names`); none for our own rows. `remark` hears what a person should know about
    the row.
    """
    row, place = again(), Place(source, files, again)
    if isinstance(row.get("fault"), DataError):  # of a format; no file can hold one
        raise row["fault"]
    foreign.check_row(row)
    images = sources.of_row(row, "image", place)
    if not images:
        raise missing(row, "image", "a path, or images: a list of paths", FIELDS)
    question = text(row, "question") or said.question or None
    if question is None:
        wanted = "a text"
        if names:
            wanted += ', or one for all rows: --set "data.question=What is in the region?"'
        raise missing(row, "question", wanted, FIELDS)
    teacher_images = sources.of_row(row, "teacher_image", place)
    found = boxes(
        row,
        _sizes(images, facts, "image", max_image_pixels),
        Drawn(
            stated_format(row, box_format, said.box_format),
            stated_image(row, said.box_image),
            ours=not names,
        ),
        lambda number: facts(images[number]).orientation,
        remark,
    )
    _sizes(teacher_images, facts, "teacher_image", max_image_pixels)
    if evidence and not found and not teacher_images:
        raise missing(
            row,
            "boxes",
            "the evidence as [[left, top, right, bottom], ...], or teacher_image: a path;"
            " opd data locate finds boxes, and view.kind=degrade needs none",
            FIELDS,
        )
    teacher_question = text(row, "teacher_question")
    choices = texts(row, "choices")
    if len(choices) > LETTERED:
        raise DataError(
            f"field 'choices': {plural(len(choices), 'choice')}; at most {LETTERED} have a letter"
        )
    _check_markers("question", with_choices(question, choices), images, "image")
    asked = with_choices(teacher_question or question, choices)
    _check_markers(
        "teacher_question" if teacher_question else "question",
        asked,
        teacher_images or images,
        "teacher image",
    )
    for what in about(row, question):
        remark(what)
    return Example(
        id=_id(row, source),
        images=images,
        question=question,
        boxes=found,
        teacher_images=teacher_images,
        teacher_question=teacher_question,
        answer=_answer(row, choices),
        choices=choices,
        weight=_weight(row),
        source=source,
        max_image_pixels=max_image_pixels,
    )


def with_names(message: str, names: Mapping[str, str]) -> str:
    """A message about one of our fields, as one about the field that a file has instead. A field
    that holds several of ours, as conversations do, is not missing where it lacks one of them."""
    begin = re.match(r"field '(\w+)'", message)
    theirs = (names.get(begin[1]) or names.get(f"{begin[1]}s")) if begin else None
    if not begin or not theirs:
        return message
    rest = message[begin.end() :]
    shared = [*names.values()].count(theirs) > 1
    return message if shared and rest.startswith(" is missing") else f"field '{theirs}'{rest}"


def _sizes(
    images: Sequence[EncodedImage],
    facts: Callable[[EncodedImage], ImageFacts],
    field: str,
    max_pixels: int,
) -> list[tuple[int, int]]:
    """(width, height) of the images of a row. Raises DataError if an image cannot be read, or if
    they are too large together."""
    sizes = []
    for picture in images:
        image = facts(picture)
        if image.fault:
            raise DataError(f"field '{field}': {image.fault}")
        sizes.append(image.size)
    pixels = sum(width * height for width, height in sizes)
    if pixels > TOGETHER * max_pixels:
        raise DataError(
            f"field '{field}': {pixels} pixels in {len(sizes)} pictures, above {TOGETHER} x"
            f" data.max_image_pixels = {max_pixels}"
        )
    return sizes


def _check_markers(field: str, question: str, images: Sequence[EncodedImage], kind: str) -> None:
    """Raises DataError if a question has more markers than there are images."""
    count = question.count(IMAGE_MARKER)
    if count > len(images):
        markers = plural(count, f"'{IMAGE_MARKER}' marker")
        raise DataError(f"field '{field}': {markers} for {plural(len(images), kind)}")


def _answer(row: Row, choices: Sequence[str]) -> str | tuple[str, ...] | None:
    """The reference answer or answers of a row; None if it has none. Raises DataError."""
    value = row.get("answer")
    if value is None or value == []:
        return None
    entries = value if isinstance(value, list) else [value]
    answers = tuple(_one_answer(entry, choices) for entry in entries)
    return answers[0] if len(answers) == 1 else answers


def _one_answer(value: Any, choices: Sequence[str]) -> str:
    """One reference answer as text. Raises DataError if it is not a text or number, or names none
    of the `choices`."""
    if not (isinstance(value, str) and value.strip()) and not is_finite(value):
        raise wrong("answer", value, "a text or a number, or a list of them")
    answer = str(whole("answer", str(value)))
    if choices and chosen(answer, choices) is None:
        raise DataError(
            f"field 'answer': {show(value)} is neither a letter nor the text of one of the"
            f" {plural(len(choices), 'choice')}"
        )
    return answer


def _id(row: Row, source: str) -> str:
    """The id of a row, else `source`. Raises DataError."""
    value = row.get("id")
    if value is None:
        return source
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise wrong("id", value, "a text or a whole number")
    return str(whole("id", str(value)))


def _weight(row: Row) -> float:
    """The weight of a row, else 1. Raises DataError."""
    value = row.get("weight")
    if value is None:
        return 1.0
    if not is_finite(value) or value < 0:
        raise wrong("weight", value, "a number of at least 0")
    return float(value)
