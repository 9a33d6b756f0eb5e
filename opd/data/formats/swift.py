"""ms-swift's JSON lines.

    messages        turns with role and content; `<image>`, `<ref-object>` and `<bbox>` stand for
                    pictures, names of objects and boxes, each in order
    images          paths, URLs, data URIs or {"bytes", "path"}
    objects         {"ref": names, "bbox": boxes, "bbox_type": "real" (pixels) or "norm1" (0..1),
                    "image_id": the picture of each box, from 0}
    teacher_images  what the teacher sees; without the field, the student's pictures
    teacher_prompt  what the teacher is asked
    query, response the older names of question and answer, in the place of messages

`<ref-object>` becomes the object's name. `<bbox>` in an answer is left out, and a question with it
is told of, since it tells the student the place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from opd.data.choices import with_options
from opd.data.fields import Row, show, wrong
from opd.data.formats.conversation import (
    PICTURES,
    Conversation,
    blocks_in,
    conversation,
    plain_answer,
    without_leading_marker,
)
from opd.data.formats.grounding import with_boxes_in_texts
from opd.data.formats.mapped import Mapped
from opd.errors import DataError

REFERENCE, BOX = "<ref-object>", "<bbox>"

UNITS = {"real": "pixels", "norm1": "fraction"}


def _messages(row: Row) -> Row:
    return _row(row, conversation("messages", row["messages"]))


def _query(row: Row) -> Row:
    question, answer = row["query"], row.get("response")
    if not isinstance(question, str):
        raise wrong("query", question, "a text")
    said = plain_answer(answer) if isinstance(answer, str) else answer
    answers = (said,) if isinstance(said, str) else ()
    return _row(row, Conversation(without_leading_marker(question), answers))


def _row(row: Row, talk: Conversation) -> Row:
    objects = _objects(row)
    names = iter(objects.get("ref") or ())
    question = _named(talk.question, names)
    answer = _named(talk.answer, names) if isinstance(talk.answer, str) else talk.answer
    own: dict[str, Any] = {**talk.own, **with_options(question), "answer": _scored(answer)}
    pictures = row.get("images") if row.get("images") is not None else row.get("image")
    own["images"] = _listed(pictures) or list(talk.pictures) or None
    own |= _boxes(objects)
    if row.get("teacher_images") == []:
        raise DataError(
            "field 'teacher_images': an empty list asks for a teacher without pictures, which opd"
            " does not have; give it pictures, or remove the field"
        )
    own["teacher_images"] = _listed(row.get("teacher_images"))
    if row.get("teacher_prompt") is not None:
        asked = conversation("teacher_prompt", row["teacher_prompt"])
        own["teacher_question"] = _named(asked.question, iter(objects.get("ref") or ()))
        if own["teacher_images"] is None and own.get("boxes") is None:
            own["teacher_images"] = own["images"]
    return with_boxes_in_texts(own)


def _objects(row: Row) -> dict[str, Any]:
    """The field objects, which may be written as JSON. Raises DataError."""
    objects = row.get("objects")
    if isinstance(objects, str):
        try:
            objects = json.loads(objects)
        except (ValueError, RecursionError) as error:
            raise wrong("objects", objects, "an object with bbox") from error
    if objects is None or objects == []:
        return {}
    if not isinstance(objects, dict):
        raise wrong("objects", objects, "an object with bbox")
    names = objects.get("ref")
    if names is not None and not (
        isinstance(names, list) and all(isinstance(name, str) for name in names)
    ):
        raise wrong("objects.ref", names, "a list of texts")
    return objects


def _boxes(objects: dict[str, Any]) -> Row:
    """The fields boxes and box_format of objects; empty if they hold no box. Raises DataError."""
    boxes, images, kind = (objects.get(name) for name in ("bbox", "image_id", "bbox_type"))
    if kind not in (None, *UNITS):
        raise DataError(f"field 'objects.bbox_type': {show(kind)} is neither real nor norm1")
    unit = {} if kind is None else {"box_format": UNITS[kind]}
    if boxes is None or boxes == []:
        return {}
    if images is None or images == [] or not isinstance(boxes, list):
        return {"boxes": boxes, **unit}
    images = images if isinstance(images, list) else [images] * len(boxes)
    if len(images) != len(boxes):
        raise DataError(
            f"field 'objects.image_id': {len(images)} pictures for {len(boxes)} boxes in bbox"
        )
    return {
        "boxes": [{"image": image, "box": box} for image, box in zip(images, boxes, strict=True)],
        **unit,
    }


def _named(text: str, names: Iterator[str]) -> str:
    """A text with the next `names` in the place of `<ref-object>`. Raises DataError."""
    first, *rest = text.split(REFERENCE)
    for part in rest:
        name = next(names, None)
        if name is None:
            raise DataError(f"field 'objects.ref': fewer names than {REFERENCE} in the texts")
        first += name + part
    return first


def _scored(answer: Any) -> Any:
    """An answer without `<bbox>`; None for an answer that is JSON with boxes, or nothing else."""
    if not isinstance(answer, str) or BOX not in answer:
        return answer
    return None if '"bbox' in answer else " ".join(answer.replace(BOX, "").split()) or None


def _listed(pictures: Any) -> Any:
    """Pictures as a list; ms-swift takes one alone too."""
    return [pictures] if isinstance(pictures, str | dict) else pictures


def _holds_texts(row: Row) -> bool:
    """Whether the contents of the messages are texts, as in ms-swift, and not blocks."""
    return not any(block.get("type") in PICTURES for block in blocks_in(row["messages"]))


NAMES = {"question": "messages", "boxes": "objects.bbox", "box_format": "objects.bbox_type"}

SWIFT = Mapped(
    "ms-swift",
    ("messages",),
    _messages,
    key="ms-swift",
    also=_holds_texts,
    names={**NAMES, "answer": "messages", "teacher_question": "teacher_prompt"},
)
QUERIES = Mapped(
    "ms-swift's queries",
    ("query", "images"),
    _query,
    key="ms-swift-query",
    names={**NAMES, "question": "query", "answer": "response"},
)
