"""Vision-OPD-6K and ZwZ-RL-VQA as JSON lines, the data of the paper (arXiv 2605.18740) and the set
that they were chosen from.

    images           paths of full pictures; in Vision-OPD-6K with the evidence framed in red
    original_images  paths of the same pictures without a frame (Vision-OPD-6K)
    problem          `<image>`, the question and its options, and in Vision-OPD-6K a sentence about
                     the red frame
    bbox             [left, top, right, bottom] in pixels of the full picture
    answer           a letter or a text
    extra_info       {"question": the question without the sentence, ...} (Vision-OPD-6K)

The rows are read clean: the picture without a frame, and the question without the sentence, as
those who use the model send them. The crop is ours.
"""

from __future__ import annotations

from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, with_options
from opd.errors import DataError
from opd.types import IMAGE_MARKER


def _clean(row: Row) -> Row:
    """A row of Vision-OPD-6K."""
    about = row["extra_info"]
    if not isinstance(about, dict) or about.get("question") is None:
        raise DataError("field 'extra_info': the question without the red frame is missing in it")
    return _row(row, row["original_images"], about["question"])


def _full(row: Row) -> Row:
    """A row of ZwZ-RL-VQA."""
    if row.get("teacher_images") is not None:
        raise DataError("field 'original_images' is missing: in 'images' the evidence is framed")
    return _row(row, row["images"], row["problem"])


def _has_no_clean(row: Row) -> bool:
    """Whether a row is not of Vision-OPD-6K, which has the same fields and more."""
    return row.get("original_images") is None


def _row(row: Row, images: object, question: object) -> Row:
    if isinstance(question, str) and question.count(IMAGE_MARKER) == 1:
        question = question.replace(IMAGE_MARKER, "").strip()  # where images stand anyway
    return {"images": images, "boxes": row["bbox"], **with_options(question)}


CLEAN = Mapped(
    "Vision-OPD-6K, clean",
    ("problem", "bbox", "original_images", "extra_info"),
    _clean,
    key="vision-opd",
    names={"images": "original_images", "question": "extra_info", "boxes": "bbox"},
)
PARENT = Mapped(
    "ZwZ-RL-VQA",
    ("problem", "bbox", "images"),
    _full,
    key="zwz",
    also=_has_no_clean,
    names={"question": "problem", "boxes": "bbox"},
)
