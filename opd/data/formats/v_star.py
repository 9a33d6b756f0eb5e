"""V* (arXiv 2312.14135): the original folders, with a JSON file beside each picture, and the
multiple-choice table made of them.

    bbox      [[left, top, width, height], ...] in pixels
    question  text
    options   texts, of which the first is right

The options are put into an order that depends on the picture's name, the question and the texts
alone, so that the right one stands anywhere, and everywhere at the same place.

The table:

    image     the picture
    text      the question with its options, "(A) red", and a request for the letter
    label     a letter
    question_id, category
"""

from __future__ import annotations

import hashlib
from pathlib import PurePosixPath
from string import ascii_uppercase

from opd.data.choices import listed_texts, with_options
from opd.data.fields import Row, wrong
from opd.data.formats.mapped import Mapped


def _folder(row: Row) -> Row:
    options = listed_texts("options", row["options"])
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise wrong("options", options, "a list of texts")
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise wrong("options", options, f"a list of 2 to {len(ascii_uppercase)} texts")
    image = row.get("image")
    name = PurePosixPath(image).stem if isinstance(image, str) else ""
    order = shuffled(f"{name}\n{row['question']}", options)
    return {
        "image": image,
        "question": row["question"],
        "boxes": row["bbox"],
        "choices": [options[place] for place in order],
        "answer": ascii_uppercase[order.index(0)],
    }


def shuffled(seed: str, texts: list[str]) -> list[int]:
    """The places of `texts` in an order that depends on `seed` and the texts alone."""

    def key(place: int) -> bytes:
        return hashlib.sha256(f"{seed}\n{texts[place]}".encode("utf-8", "replace")).digest()

    return sorted(range(len(texts)), key=key)


def _table(row: Row) -> Row:
    return {"image": row["image"], "answer": row["label"], **with_options(row["text"])}


V_STAR = Mapped(
    "V*'s folders",
    ("bbox", "question", "options"),
    _folder,
    key="vstar",
    box_format="pixels-xywh",
    names={"boxes": "bbox", "choices": "options"},
)
V_STAR_TABLE = Mapped(
    "V*",
    ("image", "text", "label", "question_id"),
    _table,
    key="vstar-table",
    names={"question": "text", "answer": "label"},
)
