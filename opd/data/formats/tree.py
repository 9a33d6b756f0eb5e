"""TreeVGR and TreeBench (arXiv 2507.07999), as JSON lines.

image             path of the picture
question          text
A, B, C, D        the options
answer            a letter
target_instances  the text of a list of [left, top, right, bottom] in pixels
"""

from __future__ import annotations

from string import ascii_uppercase

from opd.data.fields import Row
from opd.data.formats.mapped import Mapped, with_options


def _row(row: Row) -> Row:
    boxes = row["target_instances"]
    own = {"image": row["image"], "boxes": boxes, **with_options(row["question"])}
    choices = [row[letter] for letter in ascii_uppercase if row.get(letter) is not None]
    return own | ({"choices": choices} if choices else {})


TREE = Mapped(
    "TreeVGR",
    ("image", "question", "target_instances"),
    _row,
    key="treevgr",
    names={"boxes": "target_instances"},
)
