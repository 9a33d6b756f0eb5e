"""LLaVA's conversations, and Visual-CoT (arXiv 2403.16999) converted to them.

    image          path of the picture, or a list of paths, below a folder that stands elsewhere
                   (`data.images`)
    conversations  [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}, ...]

Visual-CoT gives the box behind the path, `a.jpg###[300, 210, 352, 260]`, in pixels, and asks for it
in the first turn; the second turn of gpt is the answer to the question.
"""

from __future__ import annotations

import re

from opd.data.choices import with_options
from opd.data.fields import Row, wrong
from opd.data.formats.conversation import conversation
from opd.data.formats.grounding import with_boxes_in_texts
from opd.data.formats.mapped import Mapped
from opd.errors import DataError

BEHIND = "###"

_REQUEST = re.compile(r"\s*Please provide the bounding box coordinate\b[^\n]*")
"""The request for the box, which Visual-CoT adds to every question."""


def _llava(row: Row) -> Row:
    talk = conversation("conversations", row["conversations"])
    field = "image" if row.get("image") is not None else "images"
    pictures = row.get(field)
    if isinstance(pictures, list):
        field = "images"
    elif field == "images" and pictures is not None:
        field = "image"
    return with_boxes_in_texts({**talk.own, **with_options(talk.question), field: pictures})


def _visual_cot(row: Row) -> Row:
    places = _places(row)
    boxes = [(path, box) for path, behind, box in places if behind]
    names = [path for path, behind, _ in places if not behind] or [path for path, _ in boxes]
    images = list(dict.fromkeys(names))
    for path, _ in boxes:
        if path not in images:
            raise DataError(f"field 'image': the picture {path} of a box is not in the list")
    talk = conversation("conversations", row["conversations"])
    # The first answer is the box.
    answer = talk.answers[-1] if len(talk.answers) > 1 else None
    return {
        "images": images,
        "boxes": [{"image": images.index(path), "box": box} for path, box in boxes],
        "answer": answer or None,
        **with_options(_REQUEST.sub("", talk.question).strip()),
    }


def _places(row: Row) -> list[tuple[str, str, str]]:
    """Each entry of image: the path, `###` if a box follows, and the box as text."""
    entries = row["image"] if isinstance(row["image"], list) else [row["image"]]
    if not all(isinstance(entry, str) for entry in entries):
        raise wrong("image", row["image"], "a list of paths, with a box behind ###")
    return [entry.partition(BEHIND) for entry in entries]


def _has_box_behind(row: Row) -> bool:
    entries = row["image"] if isinstance(row.get("image"), list) else [row.get("image")]
    return any(isinstance(entry, str) and BEHIND in entry for entry in entries)


LLAVA = Mapped(
    "LLaVA's conversations",
    ("conversations",),
    _llava,
    key="llava",
    also=lambda row: not _has_box_behind(row),
    names={"question": "conversations", "answer": "conversations", "boxes": "conversations"},
)
CONVERTED = Mapped(
    "Visual-CoT, converted",
    ("conversations", "image"),
    _visual_cot,
    key="visual-cot-llava",
    also=_has_box_behind,
    names={"question": "conversations", "answer": "conversations", "boxes": "image"},
)
