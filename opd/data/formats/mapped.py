"""Formats whose rows are JSON objects with fields of other names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opd.data.boxes import BoxFormat
from opd.data.fields import Row
from opd.errors import DataError

_OPTION = re.compile(r"\s*(?:\(([A-Z])\)|([A-Z])[.):])\s*(\S.*?)\s*")
"""A line that is an option: "A. red", "A) red", "A: red" or "(A) red"."""


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


def options_in(question: Any) -> list[str]:
    """The texts of options that stand in a question on lines of their own, with the letters A, B,
    ... in order; empty if there are fewer than two."""
    texts: list[str] = []
    for line in question.splitlines() if isinstance(question, str) else ():
        match = _OPTION.fullmatch(line)
        letter = (match[1] or match[2]) if match else ""
        if match and letter == chr(ord("A") + len(texts)):
            texts.append(match[3])
        elif match and letter == "A":
            texts = [match[3]]
    return texts if len(texts) > 1 else []


def with_options(question: Any) -> Row:
    """The fields question and choices of a question that may hold its options."""
    choices = options_in(question)
    return {"question": question, **({"choices": choices} if choices else {})}
