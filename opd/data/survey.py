"""Surveys the rows of a file without reading images: parses the header, and finds unknown fields.

The unit of boxes is never guessed, so a field that seems to state it under an unknown name raises
DataError.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from opd.data import foreign
from opd.data.boxes import BoxFormat, stated_format
from opd.data.fields import FIELDS, Row, cut, nearest_field
from opd.data.jsonl import Malformed
from opd.data.tables.table import CHECKED, Table, spread_places
from opd.errors import DataError, plural

SHOWN = 20
"""Largest number of fields that a note names."""

FIRST = 32
"""Number of rows among which a row is looked for that shows the columns."""

HEADER = '{"box_format": "pixels", "fraction" or "per-mille"}'
"""The header of a file, for messages."""

BOX_WORDS = {
    "box",
    "boxes",
    "bbox",
    "bboxes",
    "coord",
    "coords",
    "coordinate",
    "coordinates",
    "xyxy",
    "xywh",
}
UNIT_WORDS = {
    "format",
    "fmt",
    "unit",
    "units",
    "type",
    "mode",
    "scale",
    "space",
    "system",
    "norm",
    "normalized",
    "normalised",
    "range",
}
UNIT_NAMES = (
    "boxformat",
    "bboxformat",
    "boxesformat",
    "boxunit",
    "boxunits",
    "coordinateformat",
    "formatofboxes",
    "isnormalized",
)
"""Names, without underscores, that state the unit of boxes; similar names do too."""

PLAIN_NAMES = {
    "format",
    "unit",
    "units",
    "mode",
    "scale",
    "coordinates",
    "coords",
    "system",
    "space",
    "normalized",
    "normalised",
}
"""Names that state the unit of boxes if their value is in UNITS."""

UNITS = {
    "pixel",
    "pixels",
    "px",
    "fraction",
    "fractions",
    "relative",
    "absolute",
    "normalized",
    "normalised",
    "permille",
    "percent",
    "xyxy",
    "xywh",
    "cxcywh",
    "norm",
    "norm1",
    "norm1000",
    "real",
    "true",
    "false",
}
"""Values, without punctuation, that state a unit or a format of boxes."""


@dataclass(frozen=True)
class Survey:
    """The result of `survey`: the unit of boxes that the file states, whether the first row is a
    `header`, and notes for a person."""

    box_format: BoxFormat
    header: bool
    notes: list[str]


def survey(table: Table, to_own: Callable[[Row], Row]) -> Survey:
    """Surveys all rows of a table, of one with more than CHECKED rows so many, spread evenly; in a
    table with a header of columns, the columns. `to_own` gives a row with our fields.

    Raises DataError for an unknown header, for a header that is not the first row, and for a
    misspelt unit of boxes.
    """
    if table.columns is not None:
        return _survey_columns(table, to_own)
    unit: BoxFormat = "pixels"
    header, notes = False, []
    unknown: Counter[str] = Counter()
    for place in spread_places(len(table), CHECKED):
        where = f"{table.path.parent / table.source(place)}"
        try:
            row = table.row(place)
        except Malformed as error:
            # Skipping a malformed header would change the unit of all rows that follow.
            if not re.search("image|question", error.line) and any(
                map(_concerns_unit, re.findall(r"[\w-]+", error.line[:200]))
            ):
                raise DataError(f"{where}: {error}") from error
            continue
        except DataError:
            continue
        try:
            own = to_own(row)
            if is_header(own, first=place == 0):
                unit, header = _header(own, first=place == 0), True
                notes += [
                    f"{where}: field '{cut(name)}' of the header is not known, and not read"
                    for name in own
                    if name != "box_format"
                ]
            elif not _is_foreign(own):
                check_unit(own)
                unknown.update(_unknown(own))
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
    return Survey(unit, header, [*notes, *_notes(unknown)])


def _survey_columns(table: Table, to_own: Callable[[Row], Row]) -> Survey:
    """Surveys the columns of a table, by its first row that is not faulty."""
    names: Sequence[str] = ()
    for place in range(min(len(table), FIRST)):
        try:
            own = to_own(table.row(place))
        except DataError:
            continue
        try:
            check_unit(own)
        except DataError as error:
            raise DataError(f"{table.path.parent / table.source(place)}: {error}") from error
        names = [name for name in own if name not in FIELDS]
        break
    listed = ", ".join(f"'{cut(name)}'" for name in names[:SHOWN])
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    columns = "column" if len(names) == 1 else "columns"
    return Survey("pixels", False, [f"not read: {columns} {listed}{more}"] if names else [])


def is_header(row: Row, first: bool) -> bool:
    """Whether a line is a header and not a row. A line without a unit of boxes is a header only if
    it is the `first` of the file."""
    names = [name for name, value in row.items() if value is not None or name == "box_format"]
    if (
        not names
        or any(name in FIELDS and name not in ("box_format", "id", "weight") for name in names)
        or _is_foreign(row)
    ):
        return False
    if any(_concerns_unit(name, row[name]) for name in names):
        return True
    # A line with a misspelt field of a row is a row.
    near = {nearest_field(name, FIELDS) for name in names}
    return (
        first
        and not near & {"image", "images", "question", "boxes"}
        and not {"id", "weight"} & set(names)
    )


def _header(row: Row, first: bool) -> BoxFormat:
    """The unit of boxes that a header states. Raises DataError for an unknown header, or one that
    is not the `first` line."""
    for name, value in row.items():
        if name == "box_format":
            continue
        near = name if name in FIELDS else nearest_field(name, FIELDS)
        if _concerns_unit(name, value):
            raise DataError(
                f"field '{cut(name)}' of the header is not known; did you mean 'box_format'?"
            )
        if near and "box_format" in row:
            raise DataError(
                f"field '{cut(name)}' stands in the header, which is {HEADER}; give it to each row,"
                f" as '{near}'"
            )
    if "box_format" not in row:
        names = ", ".join(f"'{cut(name)}'" for name in list(row)[:5])
        raise DataError(
            "this line is neither a row, which has image and question, nor a header, which is"
            f" {HEADER}: it holds {names}; where rows have our fields under other names, say so:"
            " --set data.columns.question=NAME"
        )
    if not first:
        raise DataError(
            "a header stands in the first line only; give each row its own 'box_format', or split"
            " the file here"
        )
    return stated_format(row)


def check_unit(row: Row) -> None:
    """Raises DataError if a row or a box in it states a unit under an unknown name."""
    for name, value in row.items():
        if value is not None and name not in FIELDS and _concerns_unit(name, value):
            raise DataError(
                f"field '{cut(name)}' is not known; did you mean 'box_format'? (a box's unit is not"
                " guessed: rename or remove it)"
            )
    for entry in _entries(row):
        for name, value in entry.items():
            if name not in ("image", "box") and _concerns_unit(name, value):
                raise DataError(
                    f"field 'boxes': a box has no field '{cut(name)}'; give the row a 'box_format'"
                )


def _unknown(row: Row) -> list[str]:
    """Names of the unknown fields of a row, each once; those of boxes as "boxes[].name"."""
    names = [name for name, value in row.items() if value is not None and name not in FIELDS]
    inside = [
        f"boxes[].{name}"
        for entry in _entries(row)
        for name in entry
        if name not in ("image", "box")
    ]
    return list(dict.fromkeys([*names, *inside]))


def _entries(row: Row) -> list[dict[str, Any]]:
    """The boxes of a row that are objects."""
    boxes = row.get("boxes")
    return [entry for entry in boxes if isinstance(entry, dict)] if isinstance(boxes, list) else []


def _notes(unknown: Counter[str]) -> list[str]:
    """Notes about unknown fields: one for each field that is near a known one, and one for all
    others."""
    notes: list[str] = []
    others: list[str] = []
    for name, count in unknown.items():
        counted = f"'{cut(name)}' ({plural(count, 'row')})"
        near = "" if "[]" in name else nearest_field(name, FIELDS)
        if near and len(notes) < SHOWN:
            notes.append(f"field {counted} is not known; did you mean '{near}'?")
        else:
            others.append(counted)
    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        notes.append(
            f"not known, and not read: field{'s' if len(others) > 1 else ''}"
            f" {', '.join(others[:SHOWN])}{more}"
        )
    return notes


def _concerns_unit(name: str, value: Any = None) -> bool:
    """Whether a field states the unit of boxes, under whatever name."""
    stated = _states_unit(name)
    if stated is None:
        return (
            isinstance(value, str | bool)
            and re.sub(r"[\W_]", "", str(value)[:100]).lower() in UNITS
        )
    return stated


@lru_cache(4096)
def _states_unit(name: str) -> bool | None:
    """Whether a field of this name states the unit of boxes; None if its value decides."""
    words = re.findall(r"[a-z]+|[0-9]+", re.sub(r"([a-z])([A-Z])", r"\1_\2", name[:100]).lower())
    joined = "".join(words)
    if set(words) & BOX_WORDS and set(words) & UNIT_WORDS:
        return True
    if difflib.get_close_matches(joined, UNIT_NAMES, n=1, cutoff=0.85):
        return True
    return None if joined in PLAIN_NAMES else False


def _is_foreign(row: Row) -> bool:
    """Whether a row has a known format of other programs."""
    try:
        foreign.check_row(row)
    except DataError:
        return True
    return False
