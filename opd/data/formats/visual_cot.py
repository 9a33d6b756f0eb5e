"""Visual-CoT's meta rows (arXiv 2403.16999), as JSON lines.

image     path of the picture
question  text
answer    text
bboxs     [[left, top, right, bottom], ...] in pixels of the picture
"""

from __future__ import annotations

from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, with_options


def _row(row: Row) -> Row:
    return {"image": row["image"], "boxes": row["bboxs"], **with_options(row["question"])}


VISUAL_COT = Mapped(
    "Visual-CoT",
    ("image", "question", "bboxs"),
    _row,
    key="visual-cot",
    names={"boxes": "bboxs"},
)
