"""Visual-CoT's meta rows (arXiv 2403.16999).

image          path of the picture
question       text
answer         text
bboxs          [[left, top, right, bottom], ...] in pixels of the picture
width, height  the size of the picture that the boxes were drawn on
"""

from __future__ import annotations

from opd.data.choices import with_options
from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, stated_size


def _row(row: Row) -> Row:
    return {
        "image": row["image"],
        "boxes": row["bboxs"],
        "box_size": stated_size(row),
        **with_options(row["question"]),
    }


VISUAL_COT = Mapped(
    "Visual-CoT",
    ("image", "question", "bboxs"),
    _row,
    key="visual-cot",
    names={"boxes": "bboxs", "box_size": "width, height"},
)
