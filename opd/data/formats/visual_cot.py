"""Visual-CoT's meta rows (arXiv 2403.16999), as JSON lines.

image     path of the picture
question  text
answer    text
bboxs     [[left, top, right, bottom], ...] in pixels of the picture
"""

from __future__ import annotations

from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, nested, with_options


def _row(row: Row) -> Row:
    own = {"image": row["image"], "boxes": nested(row["bboxs"]), **with_options(row["question"])}
    return own | {key: row[key] for key in ("answer", "id") if row.get(key) is not None}


VISUAL_COT = Mapped("Visual-CoT", ("image", "question", "bboxs"), _row)
