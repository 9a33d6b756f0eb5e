"""Looks at every row of a data file: which rows cannot be used, which are doubtful, how large boxes
and prompts are, and which pictures occur twice.

Only a few numbers of each row are kept, so a million rows take some hundred megabytes.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from opd.data.cautions import cautions
from opd.data.duplicates import RULE, Printer, Prints, Seen, Table, duplicates, shared
from opd.data.every import EveryRow
from opd.data.tally import TOLD, Tally
from opd.errors import DataError
from opd.progress import Progress
from opd.types import Example

POLICIES = ("student", "teacher")


@dataclass(frozen=True)
class Use:
    """How training uses a row: `tokens` gives the tokens of the student's and the teacher's prompt,
    or None if no model is known, and raises DataError for a row that cannot be used.

    `limit`: longest prompt in tokens. `too_long(tokens, limit)`: reason and kind for a longer one.
    """

    tokens: Callable[[Example], tuple[int, int] | None]
    limit: int
    too_long: Callable[[int, int], tuple[str, str]]


class Looked(NamedTuple):
    """A row as the readers' threads give it: sizes (width, height) of its images, and its share of
    `Prints`."""

    example: Example
    sizes: list[tuple[int, int]]
    prints: Seen


class Repeats:
    """Finds rows with the same text: keeps 64 bits of its hash a row."""

    def __init__(self) -> None:
        self._places, self._keys = array("Q"), array("Q")

    def add(self, place: int, *texts: str) -> None:
        """Adds the row at a place."""
        digest = hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).digest()
        self._places.append(place)
        self._keys.append(int.from_bytes(digest[:8]))

    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yields the places (first, later) of each row whose text an earlier row has."""
        keys = np.array(self._keys, np.uint64)
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        earliest = first[inverse]
        for later in np.flatnonzero(earliest < np.arange(len(keys))).tolist():
            yield self._places[earliest[later]], self._places[later]


class Findings:
    """What is found in the rows, one after another."""

    def __init__(self, rows: EveryRow, use: Use) -> None:
        self.defects, self.warnings, self.prints = Tally(), Tally(), Prints()
        self.usable = 0
        self._rows, self._use = rows, use
        self._areas = array("d")
        self._lengths = (array("Q"), array("Q"))
        self._ids, self._questions = Repeats(), Repeats()

    def add(self, place: int, looked: Looked | DataError) -> None:
        """Adds the row at a place, or the fault for which it could not be read."""
        source = self._rows.source(place)
        try:
            if isinstance(looked, DataError):
                raise looked
            self._add(place, source, looked)
            self.usable += 1
        except DataError as error:
            self.defects.add(error.kind, source, str(error))

    def _add(self, place: int, source: str, looked: Looked) -> None:
        example, use = looked.example, self._use
        self.prints.add(place, looked.prints)
        self._ids.add(place, example.id)
        names = map(str, looked.prints.names)
        asked = (example.question, example.teacher_question or "", *example.choices)
        self._questions.add(place, *names, *asked)
        for box in example.boxes:
            width, height = looked.sizes[box.image]
            self._areas.append((box.x1 - box.x0) * (box.y1 - box.y0) / (width * height))
        for kind, detail in cautions(example, looked.sizes):
            self.warnings.add(kind, source, detail)
        tokens = use.tokens(example)
        if tokens is None:
            return
        for policy, length in zip(self._lengths, tokens, strict=True):
            policy.append(length)
        if max(tokens) > use.limit:
            raise DataError(*use.too_long(max(tokens), use.limit))

    def result(self) -> dict[str, Any]:
        """The findings as `opd data check --json` prints them, but for duplicates."""
        for kind, repeats in (
            ("the id stands twice", self._ids),
            ("picture and question stand twice", self._questions),
        ):
            for earlier, later in repeats.pairs():
                other = f"as in {self._rows.source(earlier)}"
                self.warnings.add(kind, self._rows.source(later), other)
        return {
            "format": self._rows.format,
            "rows": len(self._rows),
            "usable": self.usable,
            "defects": self.defects.result(),
            "warnings": self.warnings.result(),
            "box_area": _areas(self._areas),
            "tokens": {
                policy: _tokens(lengths, self._use.limit)
                for policy, lengths in zip(POLICIES, self._lengths, strict=True)
            },
        }


def check(
    rows: EveryRow, use: Use, progress: Progress, against: EveryRow | None = None
) -> dict[str, Any]:
    """What is found in every row, as `opd data check --json` prints it (docs/data.md).

    `against`: other data, whose pictures are searched for in the rows.
    """
    findings = Findings(rows, use)
    _look_at(rows, "check", progress, findings.add)
    table, overlap = findings.prints.table(), None
    if against is not None:
        others = Prints()

        def add(place: int, looked: Looked | DataError) -> None:
            if isinstance(looked, Looked):
                others.add(place, looked.prints)

        _look_at(against, "against", progress, add)
        places = findings.prints.places_of(table.names[shared(table, others.table())])
        overlap = len(places)
        for place in places:
            findings.warnings.add(
                "a picture of the other data", rows.source(place), f"it is in {against.path}"
            )
    twice = _duplicates(rows, table)
    return {
        **findings.result(),
        "near_duplicates": twice["near"],
        "overlap": overlap,
        "duplicates": twice,
    }


def _look_at(
    rows: EveryRow,
    phase: str,
    progress: Progress,
    add: Callable[[int, Looked | DataError], None],
) -> None:
    """Calls `add` for every row, in order."""
    printer = Printer(rows.digest)

    def look(place: int, example: Example) -> Looked:
        sizes = [rows.size(source) for source in example.images]
        return Looked(example, sizes, printer(example))

    progress.begin(phase, len(rows))
    for place, looked in enumerate(rows.each(look)):
        add(place, looked)
        progress.advance(1)


def _duplicates(rows: EveryRow, table: Table) -> dict[str, Any]:
    """Numbers of pictures that an earlier one is equal or near to, and the rows of the first."""
    exact, near = duplicates(table)
    earlier = np.maximum(exact, near)
    later = np.flatnonzero(earlier >= 0)
    first = [
        [rows.source(int(table.places[earlier[each]])), rows.source(int(table.places[each]))]
        for each in later[:TOLD]
    ]
    return {
        "exact": int((exact >= 0).sum()),
        "near": int((near >= 0).sum()),
        "rule": RULE,
        "first": first,
    }


def _areas(shares: Sequence[float]) -> dict[str, float] | None:
    """Quantiles of the boxes' shares of their pictures, in 0..1; None without boxes."""
    if not len(shares):
        return None
    values = np.array(shares)
    return {"min": float(values.min()), **_quantiles(values, median=0.5, p95=0.95, max=1.0)}


def _tokens(lengths: Sequence[int], limit: int) -> dict[str, int] | None:
    """Quantiles of prompts in tokens, and the number above `limit`; None without a model."""
    if not len(lengths):
        return None
    values = np.array(lengths, np.int64)
    quantiles = _quantiles(values, median=0.5, p95=0.95, p99=0.99, max=1.0)
    return {
        **{name: int(value) for name, value in quantiles.items()},
        "above_limit": int((values > limit).sum()),
    }


def _quantiles(values: NDArray[Any], **shares: float) -> dict[str, float]:
    """Quantiles by name; each is one of the values."""
    return {
        name: float(np.quantile(values, share, method="inverted_cdf"))
        for name, share in shares.items()
    }
