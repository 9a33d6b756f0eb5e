"""Boxes that stand in the texts of a row, as Qwen's models write them.

    Qwen2-VL                 <|box_start|>(120,300),(180,352)<|box_end|>, in thousandths
    Qwen2.5-VL               {"bbox_2d": [x0, y0, x1, y1]}, in pixels of the resized picture
    Qwen3-VL and Qwen3.5     {"bbox_2d": [x0, y0, x1, y1]}, in thousandths

The last two look alike, so a person says which it is (`data.box_format`).
"""

from __future__ import annotations

import re
from typing import Any

from opd.data.boxes import UNSETTLED
from opd.data.fields import Row
from opd.errors import DataError

_NUMBER = r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*"
_TOKENS = re.compile(
    rf"<\|box_start\|>\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*<\|box_end\|>"
)
_JSON = re.compile(rf"[\"']bbox_2d[\"']\s*:\s*\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_REFERENCE = re.compile(r"<\|object_ref_(?:start|end)\|>")

DIALECTS = ((_TOKENS, "per-mille"), (_JSON, UNSETTLED))


def with_boxes_in_texts(own: Row) -> Row:
    """A row in our fields, with the boxes that its answer holds, or else its question, if it has no
    evidence yet. An answer keeps its words without the boxes; one that is JSON has none. Raises
    DataError for boxes of both dialects in one text."""
    if any(own.get(field) is not None for field in ("boxes", "teacher_image", "teacher_images")):
        return own
    for field in ("answer", "question"):
        boxes, unit = _boxes_in(own.get(field))
        if boxes:
            found = {**own, "boxes": boxes, "box_format": unit}
            return {**found, "answer": _words(own["answer"])} if field == "answer" else found
    return own


def _boxes_in(text: Any) -> tuple[list[list[float]], str]:
    """The boxes in a text, and their unit."""
    if not isinstance(text, str):
        return [], ""
    found = [
        ([[float(number) for number in match.groups()] for match in pattern.finditer(text)], unit)
        for pattern, unit in DIALECTS
    ]
    dialects = [(boxes, unit) for boxes, unit in found if boxes]
    if len(dialects) > 1:
        raise DataError("field 'boxes': a text holds both <|box_start|> and 'bbox_2d'")
    return dialects[0] if dialects else ([], "")


def _words(answer: str) -> str | None:
    """The words of an answer without boxes; None if there are none."""
    if _JSON.search(answer):
        return None
    return " ".join(_REFERENCE.sub("", _TOKENS.sub("", answer)).split()) or None
