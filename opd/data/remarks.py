"""Counts what rows have in common that a person should know but that makes no row faulty."""

from __future__ import annotations

import re
from collections import Counter
from threading import Lock

from opd.data.fields import Row
from opd.errors import plural

PLACE_TOLD = "a question with `<bbox>` or coordinates tells the student where to look"
"""The remark about a question for which `tells_place`."""

_NUMBER = r"\s*\d+(?:\.\d+)?\s*"
_PLACE = re.compile(
    r"<bbox>|<\|box_start\|>|\bbbox_2d\b"
    rf"|[\[(<{{]{_NUMBER}(?:,{_NUMBER}){{3}}[\])>}}]"
    rf"|\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)"
)


def tells_place(question: str) -> bool:
    """Whether a question holds a box: `<bbox>`, four numbers in brackets, or two corners."""
    return _PLACE.search(question) is not None


def about(row: Row, question: str) -> list[str]:
    """The remarks about a row in our fields. A format gives its own as a tuple in the field
    `remarks`, which no file can hold: a list there is a column of a person's own."""
    own = row.get("remarks")
    told = [PLACE_TOLD] if tells_place(question) else []
    return [*told, *own] if isinstance(own, tuple) else told


class Remarks:
    """Counts the rows of each remark; safe for threads."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = Lock()

    def add(self, remark: str) -> None:
        """Counts a row."""
        with self._lock:
            self._counts[remark] += 1

    def notes(self) -> list[str]:
        """A line for a person about each remark, with its number of rows."""
        return [f"{remark} ({plural(count, 'row')})" for remark, count in self._counts.items()]
