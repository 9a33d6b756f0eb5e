"""Our own format: JSONL, one example a line, as people write it by hand.

image or images                  path or paths, relative to the file
question                         text; `<image>` says where an image stands
boxes                            [[left, top, right, bottom], ...], or {"image": 1, "box": [...]} for another than the first image
box_format                       "pixels" (default), "fraction" (0..1 of width and height) or "per-mille" (0..1000); a first line
                                 with nothing else says it for the whole file
teacher_image or teacher_images  instead of boxes: what the teacher sees
teacher_question                 where the teacher is asked something else
answer, choices                  for measuring only; with choices, the answer is a letter or the text of one
id, weight                       id: file:line by default; weight of the example in the loss: 1 by default

Boxes are in the upright image, after its EXIF orientation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opd.answers import chosen
from opd.data.boxes import BoxFormat, boxes, stated_format
from opd.data.dataset import ImageFacts
from opd.data.fields import Row, is_finite, missing, paths, show, text, texts, wrong
from opd.data.jsonl import Lines, parse
from opd.errors import DataError
from opd.prompts import IMAGE_MARKER
from opd.types import Example

FIELDS = (
    *("image", "images", "question", "boxes", "box_format", "teacher_image", "teacher_images", "teacher_question"),
    *("answer", "choices", "id", "weight"),
)


def take_header(lines: Lines) -> tuple[BoxFormat, list[tuple[int, str]]]:
    """The file's box format, and the rows without the header. Raises DataError: a wrong header would change every row's meaning."""
    number, line = lines.rows[0]
    if '"box_format"' not in line or '"question"' in line:
        return "pixels", lines.rows
    try:
        row = parse(line)
        return (stated_format(row), lines.rows[1:]) if set(row) == {"box_format"} else ("pixels", lines.rows)
    except DataError as error:
        raise DataError(f"{lines.path}:{number}: {error}") from error


def read_row(
    row: Row, source: str, folder: Path, box_format: BoxFormat, facts: Callable[[Path], ImageFacts], max_image_pixels: int
) -> Example:
    """The example of a row. `folder`: what paths are relative to; `facts` reads an image. Raises DataError."""
    images = paths(row, "image", folder)
    if not images:
        raise missing(row, "image", "a path, or images: a list of paths", FIELDS)
    question = text(row, "question")
    if question is None:
        raise missing(row, "question", "a text", FIELDS)
    teacher_images = paths(row, "teacher_image", folder)
    evidence = boxes(row, _sizes(images, facts, "image"), stated_format(row, box_format))
    _sizes(teacher_images, facts, "teacher_image")
    if not evidence and not teacher_images:
        raise missing(row, "boxes", "the evidence as [[left, top, right, bottom], ...], or teacher_image: a path", FIELDS)
    teacher_question = text(row, "teacher_question")
    _check_markers("question", question, images, "images")
    _check_markers(
        "teacher_question" if teacher_question else "question", teacher_question or question, teacher_images or images, "teacher images"
    )
    choices = texts(row, "choices")
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


def _sizes(images: Sequence[Path], facts: Callable[[Path], ImageFacts], field: str) -> list[tuple[int, int]]:
    found = [facts(path) for path in images]
    for fault in (one.fault for one in found if one.fault):
        raise DataError(f"field '{field}': {fault}")
    return [one.size for one in found]


def _check_markers(field: str, question: str, images: Sequence[Path], kind: str) -> None:
    count = question.count(IMAGE_MARKER)
    if count > len(images):
        raise DataError(f"field '{field}': {count} '{IMAGE_MARKER}' markers for {len(images)} {kind}")


def _answer(row: Row, choices: Sequence[str]) -> str | None:
    found = row.get("answer")
    if found is None:
        return None
    if not (isinstance(found, str) and found.strip()) and not is_finite(found):
        raise wrong("answer", found, "a text or a number")
    answer = str(found)
    if choices and chosen(answer, choices) is None:
        raise DataError(f"field 'answer': {show(found)} is neither a letter nor the text of one of the {len(choices)} choices")
    return answer


def _id(row: Row, source: str) -> str:
    found = row.get("id")
    if found is None:
        return source
    if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
        raise wrong("id", found, "a text or a whole number")
    return str(found)


def _weight(row: Row) -> float:
    found = row.get("weight")
    if found is None:
        return 1.0
    if not is_finite(found) or found < 0:
        raise wrong("weight", found, "a number of at least 0")
    return float(found)
