"""Formats whose rows are JSON objects with fields of other names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any

from opd.data.boxes import BoxFormat
from opd.data.choices import with_options
from opd.data.fields import Row, is_number
from opd.errors import DataError


@dataclass(frozen=True, eq=False)
class Mapped:
    """Reads another program's rows (`opd.data.formats.format.Format`).

    A row has this format if it has all fields `marks`, and `also` holds. `to_own` gives a row with
    our fields (docs/data.md), and raises DataError for a faulty row. The fields `answer` and `id`
    are ours already. `key` is the format's name in `data.format`. `names`: what the format calls
    our fields, for messages.
    """

    name: str
    marks: tuple[str, ...]
    to_own: Callable[[Row], Row]
    key: str = ""
    box_format: BoxFormat = "pixels"
    also: Callable[[Row], bool] = lambda row: True
    names: Mapping[str, str] = field(default_factory=dict)

    def matches(self, row: Row) -> bool:
        """Whether a row has the format."""
        return _has(row, self.marks) and self.also(row)

    def own(self, row: Row) -> Row:
        """The row with our fields. Raises DataError for a faulty row."""
        for mark in self.marks:
            if row.get(mark) is None:
                raise DataError(f"field '{mark}' is missing; {self.name} has it in every row")
        return {**{name: row.get(name) for name in ("answer", "id")}, **self.to_own(row)}


def _has(row: Row, fields: Iterable[str]) -> bool:
    return all(row.get(field) is not None for field in fields)


def is_own(row: Row) -> bool:
    """Whether a row has our question, and our evidence."""
    evidence = ("boxes", "teacher_image", "teacher_images")
    return _has(row, ["question"]) and any(_has(row, [field]) for field in evidence)


def with_lettered_options(row: Row) -> Row:
    """The fields question and choices of a row that holds its options in columns A, B, ..., or in
    its question. Raises DataError for a letter that is left out."""
    given = [row.get(letter) for letter in ascii_uppercase]
    there = [value is not None and value == value and value != "" for value in given]
    count = sum(there)
    if not all(there[:count]):
        left_out = ascii_uppercase[there.index(False)]
        raise DataError(f"field '{left_out}' is missing: later options are there")
    if not count:
        return with_options(row["question"])
    choices = [str(value) if is_number(value) else value for value in given[:count]]
    return {"question": row["question"], "choices": choices}


def stated_size(row: Row) -> list[Any] | None:
    """[width, height] of the picture that the boxes of a row were drawn on; None if it has none."""
    size = [row.get("width"), row.get("height")]
    return None if None in size else size
