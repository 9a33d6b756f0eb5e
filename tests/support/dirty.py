"""A deliberately dirty data set: 200 rows, in which every fault is known and counted."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROWS = 200
SIZE = 120, 90
LISTED = "Which?\nA. red\nB. blue\n"


@dataclass
class Dirty:
    """The data set: its file, another file that shares some pictures, and what is wrong."""

    path: Path
    other: Path
    defects: Counter[str] = field(default_factory=Counter)
    warnings: Counter[str] = field(default_factory=Counter)
    exact: int = 0
    near: int = 0
    overlap: int = 0

    @property
    def usable(self) -> int:
        return ROWS - self.defects.total()


def picture(seed: int) -> Image.Image:
    """A smooth picture that is like no other one."""
    values = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    return Image.fromarray(values).resize(SIZE, Image.Resampling.BICUBIC)


def _missing(folder: Path, name: str) -> None:
    (folder / name).unlink()


def _cut(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])


def _text(folder: Path, name: str) -> None:
    (folder / name).write_text("not a picture")


FILES: list[tuple[str, int, Callable[[Path, str], None]]] = [
    ("field 'image': image not found", 7, _missing),
    ("field 'image': image cannot be read: ... image file is truncated", 5, _cut),
    ("field 'image': image cannot be read: ... not an image", 3, _text),
]
"""Faults of pictures: the beginning of the kind, the number of rows, and what is done."""

DEFECTS: list[tuple[str, int, dict[str, Any]]] = [
    ("field 'boxes': box ... is outside the image of", 6, {"boxes": [[10, 10, 500, 40]]}),
    ("field 'boxes': box ... is empty or inverted", 4, {"boxes": [[40, 10, 10, 40]]}),
    ("field 'question' is missing: a text", 5, {"question": None}),
    ("field 'boxes' is missing: the evidence as", 4, {"boxes": None}),
    (
        "field 'answer': ... is neither a letter nor the text",
        6,
        {"choices": ["red", "blue"], "answer": "C"},
    ),
    ("field 'question': ... holds half of a character", 3, {"question": "What is \ud83d there?"}),
    ("field 'weight': ... is not a number of at least", 2, {"weight": -1}),
]
"""Faults of fields: the beginning of the kind, the number of rows, and the fields that make it."""

BROKEN = 4
"""Number of rows that are no JSON."""

WARNINGS: list[tuple[str, int, dict[str, Any]]] = [
    ("the question tells the place", 5, {"question": "What stands in <bbox>?"}),
    ("the question tells the place", 4, {"question": "What stands at [10, 20, 30, 40]?"}),
    ("a box above half of its picture", 6, {"boxes": [[0, 0, 100, 80]]}),
    ("a box with a side below 4 pixels", 5, {"boxes": [[10, 10, 13, 30]]}),
    ("the id stands twice", 3, {"id": "first"}),
    (
        "the answer is no option of the question",
        4,
        {"question": "Which?\nA. red\nB. blue\n", "answer": "D"},
    ),
    ("two choices are the same", 3, {"choices": ["red", "Red ", "blue"], "answer": "blue"}),
    ("the weight is 0", 2, {"weight": 0}),
]
"""Doubtful rows, in the same form."""


def dirty(folder: Path) -> Dirty:
    """Writes the data set into a folder."""
    (folder / "images").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        name = f"images/{number}.png"
        picture(number).save(folder / name)
        question = f"What is written on sign {number}?"
        rows.append({"image": name, "question": question, "boxes": [[10, 10, 40, 40]]})
    made = Dirty(folder / "dirty.jsonl", folder / "other.jsonl")
    free = iter(range(1, ROWS))
    rows[0]["id"] = "first"
    for kind, count, spoil in FILES:
        made.defects[kind] += count
        for _ in range(count):
            spoil(folder, rows[next(free)]["image"])
    for table, counted in ((DEFECTS, made.defects), (WARNINGS, made.warnings)):
        for kind, count, fields in table:
            counted[kind] += count
            for _ in range(count):
                rows[next(free)].update(fields)
    original = next(free)
    for _ in range(3):  # a copy of one picture
        copied = rows[next(free)]["image"]
        shutil.copy(folder / rows[original]["image"], folder / copied)
    made.exact = 3
    for number in range(4):  # saved again and smaller; two of the rows show the same file
        copy, first = rows[next(free)], rows[next(free)]
        copy["image"] = f"images/copy-{number // 2 * 2}.jpg"
        if number % 2 == 0:
            smaller = picture(int(Path(first["image"]).stem)).resize((100, 75))
            smaller.save(folder / copy["image"], quality=80)
    made.near = 2
    for _ in range(4):  # the same question about the same picture
        again, first = rows[next(free)], rows[next(free)]
        again.update(image=first["image"], question=first["question"])
    made.warnings["picture and question stand twice"] = 4
    for _ in range(3):  # other questions about the same picture are not doubtful
        rows[next(free)]["image"] = rows[original]["image"]
    shared = [next(free) for _ in range(5)]
    for number in shared[:3]:
        shutil.copy(folder / rows[number]["image"], folder / "images" / f"other-{number}.png")
    for number in shared[3:]:
        picture(number).resize((240, 180)).save(folder / "images" / f"other-{number}.png")
    own = [picture(10_000 + number) for number in range(20)]
    for number, image in enumerate(own):
        image.save(folder / "images" / f"other-own-{number}.png")
    made.overlap = 5
    made.warnings["a picture of the other data"] = 5
    lines = [json.dumps(row) for row in rows]
    for _ in range(BROKEN):
        place = next(free)
        lines[place] = lines[place][:-10]
    made.defects["not JSON: "] = BROKEN
    made.path.write_text("\n".join(lines))
    others = [f"images/other-{number}.png" for number in shared]
    others += [f"images/other-own-{number}.png" for number in range(20)]
    others += ["images/nowhere.png"]  # the other data have faults of their own
    made.other.write_text(
        "\n".join(
            json.dumps({"image": name, "question": "What?", "boxes": [[10, 10, 40, 40]]})
            for name in others
        )
    )
    return made
