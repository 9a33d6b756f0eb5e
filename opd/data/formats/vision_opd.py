"""Vision-OPD-6K and ZwZ-RL-VQA, the data of the paper (arXiv 2605.18740) and the set that they were
chosen from, as JSON lines.

    images           paths of full pictures; in Vision-OPD-6K with the evidence framed in red
    original_images  paths of the same pictures without a frame (Vision-OPD-6K)
    teacher_images   paths of crops (Vision-OPD-6K)
    problem          `<image>`, the question and its options, and in Vision-OPD-6K a sentence about
                     the red frame
    bbox             [left, top, right, bottom] in pixels of the full picture
    answer           a letter or a text
    extra_info       {"question": the question without the sentence, ...} (Vision-OPD-6K)

The rows are read clean: the picture without a frame, and the question without the sentence, as
those who use the model send them. The crop is ours. `data.format=vision-opd-paper` reads them as
the official run does: `images` and `teacher_images` as they are, and both with the sentence.

The Parquet file that the official converter makes of them holds the paper's pictures alone:

    images, bbox_images  full pictures with a frame, and crops; lists of paths, or of {"path": path}
    prompt               [{"role": "user", "content": the problem}]
    reward_model         {"ground_truth": the answer}
"""

from __future__ import annotations

from typing import Any

from opd.data.choices import with_options
from opd.data.fields import Row
from opd.data.formats.conversation import conversation, without_leading_marker
from opd.data.formats.mapped import Mapped
from opd.errors import DataError

FRAMED = "the student sees the evidence framed in red, and is told so"
"""The remark about rows that are read as the paper does."""


def _clean(row: Row) -> Row:
    about = row.get("extra_info")
    if not isinstance(about, dict) or about.get("question") is None:
        raise DataError(
            "field 'extra_info': the question without the sentence about the red frame is missing"
            " in it; data.format=vision-opd-paper reads the rows with the frame"
        )
    return _with_box(row, row["original_images"], about["question"])


def _full(row: Row) -> Row:
    """A row of ZwZ-RL-VQA."""
    if row.get("teacher_images") is not None:
        raise DataError("field 'original_images' is missing: in 'images' the evidence is framed")
    return _with_box(row, row["images"], row["problem"])


def _with_box(row: Row, images: object, question: object) -> Row:
    return {"images": images, "boxes": row["bbox"], **with_options(_plain(question))}


def _paper(row: Row) -> Row:
    return _framed(row["images"], row["teacher_images"], row["problem"])


def _parquet(row: Row) -> Row:
    asked = conversation("prompt", row["prompt"])
    own = _framed(row["images"], row["bbox_images"], asked.question)
    return {**own, "answer": ground_truth(row)}


def _framed(images: object, crops: object, question: object) -> Row:
    own = {"images": images, "teacher_images": crops, "remarks": (FRAMED,)}
    return {**own, **with_options(_plain(question))}


def _plain(question: object) -> Any:
    return without_leading_marker(question) if isinstance(question, str) else question


def ground_truth(row: Row) -> Any:
    """The reference answer of a row in verl's format; None if it has none."""
    reward = row.get("reward_model")
    return reward.get("ground_truth") if isinstance(reward, dict) else None


CLEAN = Mapped(
    "Vision-OPD-6K, clean",
    ("problem", "bbox", "original_images"),
    _clean,
    key="vision-opd",
    names={"images": "original_images", "question": "extra_info", "boxes": "bbox"},
)
PAPER = Mapped(
    "Vision-OPD-6K, as in the paper",
    ("problem", "images", "teacher_images"),
    _paper,
    key="vision-opd-paper",
    names={"question": "problem"},
)
PARQUET = Mapped(
    "Vision-OPD-6K's Parquet, as in the paper",
    ("prompt", "images", "bbox_images"),
    _parquet,
    key="vision-opd-parquet",
    names={"question": "prompt", "teacher_images": "bbox_images", "answer": "reward_model"},
)
PARENT = Mapped(
    "ZwZ-RL-VQA",
    ("problem", "bbox", "images"),
    _full,
    key="zwz",
    also=lambda row: row.get("original_images") is None,
    names={"question": "problem", "boxes": "bbox"},
)
