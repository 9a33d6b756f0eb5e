"""Our own format: JSONL, one example a line, as people write it by hand.

    image or images     path or paths, relative to the file
    question            text; `<image>` in it says where an image stands
    boxes               [[left, top, right, bottom], ...], or {"image": 1, "box": [...]} for
                        another image than the first
    box_format          "pixels" (default), "fraction" (0..1 of width and height) or "per-mille"
                        (0..1000); a first line with nothing else says it for the whole file
    teacher_image or teacher_images
                        what the teacher sees, instead of boxes
    teacher_question    what the teacher is asked, if it is something else
    answer              for measuring only; a list: any of them is right; with choices, a letter or
                        the text of a choice
    choices             the options, put into the prompt if the question does not hold them
    id                  file:line by default
    weight              weight of the example in the loss: 1 by default

Boxes are in the upright image, after its EXIF orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from opd.data import foreign
from opd.data.answers import chosen
from opd.data.boxes import BoxFormat, boxes, stated_format
from opd.data.choices import with_choices
from opd.data.fields import Row, is_finite, missing, paths, show, text, texts, whole, wrong
from opd.data.formats.format import Rows
from opd.data.jsonl import parse, read_lines
from opd.data.pictures import ImageFacts
from opd.data.survey import FIELDS, survey
from opd.errors import DataError, plural
from opd.types import IMAGE_MARKER, Example

LETTERED = len(ascii_uppercase)
"""The most choices that have a letter."""

TOGETHER = 4
"""A row's pictures are held together while its prompt is made: at most so many times
`data.max_image_pixels`."""


class Own:
    """Reads our own JSONL, and JSON arrays of its rows."""

    name = "opd's own rows"

    def recognise(self, path: Path, start: bytes) -> bool:
        """Any text: `read` says what is wrong with one that holds other rows."""
        return True

    def read(self, path: Path) -> Rows:
        """The lines of a file that are rows. Raises DataError for a file of another kind."""
        lines = read_lines(path)
        seen = survey(lines)
        rows = [(number, partial(parse, line)) for number, line in seen.rows]
        return Rows(path, lines.content, rows, seen.box_format, seen.notes)


def read_row(
    row: Row,
    source: str,
    folder: Path,
    box_format: BoxFormat,
    facts: Callable[[Path], ImageFacts],
    max_image_pixels: int,
) -> Example:
    """The example of a row. `folder`: what paths are relative to; `facts` reads an image. Raises
    DataError."""
    foreign.check_row(row)
    images = paths(row, "image", folder)
    if not images:
        raise missing(row, "image", "a path, or images: a list of paths", FIELDS)
    question = text(row, "question")
    if question is None:
        raise missing(row, "question", "a text", FIELDS)
    teacher_images = paths(row, "teacher_image", folder)
    evidence = boxes(
        row, _sizes(images, facts, "image", max_image_pixels), stated_format(row, box_format)
    )
    _sizes(teacher_images, facts, "teacher_image", max_image_pixels)
    if not evidence and not teacher_images:
        raise missing(
            row,
            "boxes",
            "the evidence as [[left, top, right, bottom], ...], or teacher_image: a path",
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
    return Example(
        id=_id(row, source),
        images=images,
        question=question,
        boxes=evidence,
        teacher_images=teacher_images,
        teacher_question=teacher_question,
        answer=_answer(row, choices),
        choices=choices,
        weight=_weight(row),
        source=source,
        max_image_pixels=max_image_pixels,
    )


def _sizes(
    images: Sequence[Path], facts: Callable[[Path], ImageFacts], field: str, max_pixels: int
) -> list[tuple[int, int]]:
    found = [facts(path) for path in images]
    for fault in (one.fault for one in found if one.fault):
        raise DataError(f"field '{field}': {fault}")
    if (pixels := sum(one.size[0] * one.size[1] for one in found)) > TOGETHER * max_pixels:
        raise DataError(
            f"field '{field}': {pixels} pixels in {len(found)} pictures, above {TOGETHER} x"
            f" data.max_image_pixels = {max_pixels}"
        )
    return [one.size for one in found]


def _check_markers(field: str, question: str, images: Sequence[Path], kind: str) -> None:
    count = question.count(IMAGE_MARKER)
    if count > len(images):
        markers = plural(count, f"'{IMAGE_MARKER}' marker")
        raise DataError(f"field '{field}': {markers} for {plural(len(images), kind)}")


def _answer(row: Row, choices: Sequence[str]) -> str | tuple[str, ...] | None:
    """The reference answer, or several of which any is right."""
    found = row.get("answer")
    if found is None or found == []:
        return None
    answers = [
        _one_answer(entry, choices) for entry in (found if isinstance(found, list) else [found])
    ]
    return answers[0] if len(answers) == 1 else tuple(answers)


def _one_answer(found: Any, choices: Sequence[str]) -> str:
    if not (isinstance(found, str) and found.strip()) and not is_finite(found):
        raise wrong("answer", found, "a text or a number, or a list of them")
    answer = str(whole("answer", str(found)))
    if choices and chosen(answer, choices) is None:
        raise DataError(
            f"field 'answer': {show(found)} is neither a letter nor the text of one of the"
            f" {plural(len(choices), 'choice')}"
        )
    return answer


def _id(row: Row, source: str) -> str:
    found = row.get("id")
    if found is None:
        return source
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        raise wrong("id", found, "a text or a whole number")
    return str(whole("id", str(found)))


def _weight(row: Row) -> float:
    found = row.get("weight")
    if found is None:
        return 1.0
    if not is_finite(found) or found < 0:
        raise wrong("weight", found, "a number of at least 0")
    return float(found)
