"""TreeVGR and TreeBench (arXiv 2507.07999).

image             the picture: a path, or base64
question          text
A, B, C, D        the options
answer            a letter
target_instances  a list of [left, top, right, bottom] in pixels, as a text
"""

from __future__ import annotations

from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, with_lettered_options


def _row(row: Row) -> Row:
    return {
        "image": row["image"],
        "boxes": row["target_instances"],
        **with_lettered_options(row),
    }


TREE = Mapped(
    "TreeVGR",
    ("image", "question", "target_instances"),
    _row,
    key="treevgr",
    names={"boxes": "target_instances"},
)
