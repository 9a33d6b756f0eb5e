"""Columns of a table that hold our fields under other names."""

from __future__ import annotations

import ast
import difflib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from opd.data.fields import ALIASES, FIELDS, Row, cut
from opd.data.tables.table import Table
from opd.errors import DataError

SHOWN = 20
"""Largest number of columns that a message lists."""

STRUCTURED = ("images", "boxes", "box_size", "teacher_images", "choices")
"""Fields whose values are lists, which a table of texts holds as a text."""

LITERAL = 65_536
"""Largest number of characters of a list in Python's notation."""


@dataclass(frozen=True)
class Columns:
    """The columns that hold our fields, by field; a column `a.b` is the field b of the object in
    column a. `texts`: all values are texts, as in CSV."""

    names: Mapping[str, str]
    texts: bool = False

    def own(self, row: Row) -> Row:
        """A row with our fields in the place of the columns, and all others as they are."""
        if not self.names and not self.texts:
            return row
        taken = set(self.names.values())
        others = {name: value for name, value in row.items() if name not in taken}
        own = {**others, **self.named(row)}
        return {name: parsed(name, value) for name, value in own.items()} if self.texts else own

    def named(self, row: Row) -> Row:
        """The fields that columns are named for."""
        return {field: value_in(row, column) for field, column in self.names.items()}


def check_columns(table: Table, head: Sequence[Row], columns: Mapping[str, str]) -> None:
    """Raises DataError for a column of `data.columns` that neither the header nor any of the first
    rows has."""
    known = list(table.columns or dict.fromkeys(name for row in head for name in row))
    for field, column in columns.items():
        if column in known or any(value_in(row, column) is not None for row in head):
            continue
        near = difflib.get_close_matches(column, known, n=1, cutoff=0.5)
        meant = f"did you mean '{cut(near[0])}'? " if near else ""
        more = f" and {len(known) - SHOWN} more" if len(known) > SHOWN else ""
        names = ", ".join(f"'{cut(name)}'" for name in known[:SHOWN])
        raise DataError(
            f"{table.path}: data.columns.{field}: there is no column '{cut(column)}'; {meant}"
            f"the columns are {names}{more}"
        )


def check_complete(table: Table, columns: Columns, question: str) -> None:
    """Raises DataError for a table with a header that has no column for pictures, or none for
    questions; `question`: the question of rows that have none."""
    known = {*(table.columns or ()), *columns.names}
    lacking = [] if {"image", "images"} & known else ["image"]
    lacking += [] if question or "question" in known else ["question"]
    if table.columns is None or not lacking:
        return
    more = f" and {len(table.columns) - SHOWN} more" if len(table.columns) > SHOWN else ""
    names = ", ".join(f"'{cut(name)}'" for name in table.columns[:SHOWN])
    say = " and ".join(f"--set data.columns.{field}=COLUMN" for field in lacking)
    raise DataError(
        f"{table.path}: no column is known to hold the {' and the '.join(lacking)}; say which:"
        f" {say} (the columns are {names}{more})"
    )


def usual(table: Table, given: Mapping[str, str]) -> tuple[Columns, list[str]]:
    """The columns of our fields: those that a person gives, and, in a table with a header, columns
    with usual names, where exactly one fits a field; and lines about these."""
    texts = table.kind in ("CSV", "TSV")
    if table.columns is None:
        return Columns(given, texts), []
    fitting: dict[str, list[str]] = {}
    for column in table.columns:
        field = _field(column)
        if field and column not in FIELDS and column not in given.values():
            fitting.setdefault(field, []).append(column)
    found, notes = {}, []
    for field, columns in fitting.items():
        if {field, f"{field}s"} & {*table.columns, *given}:
            continue
        if len(columns) == 1:
            found[field] = columns[0]
        else:
            names = " or ".join(f"'{cut(column)}'" for column in columns)
            notes.append(
                f"{names} may be the field {field}; say which: --set data.columns.{field}=COLUMN"
            )
    if found:
        read = ", ".join(f"'{cut(column)}' as {field}" for field, column in found.items())
        notes.insert(0, f"columns are read under our names: {read}")
    return Columns({**found, **given}, texts), notes


def value_in(row: Row, column: str) -> Any:
    """The value of a column; of "a.b" also the field b of the object in column a; else None."""
    if column in row or "." not in column:
        return row.get(column)
    first, _, rest = column.partition(".")
    inner = row.get(first)
    return value_in(inner, rest) if isinstance(inner, dict) else None


def parsed(field: str, value: Any) -> Any:
    """The value of a field that a table of texts holds as `value`: lists are parsed, as JSON or in
    Python's notation, and never evaluated; the weight is a number."""
    if not isinstance(value, str):
        return value
    if field == "weight":
        with suppress(ValueError):
            return float(value)
    if field in STRUCTURED and value.lstrip()[:1] in ("[", "{"):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        if len(value) <= LITERAL:
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
                return ast.literal_eval(value.strip())
    return value


def _field(column: str) -> str:
    """The field that a column with a usual name holds; empty for another column."""
    plain = "_".join(column.lower().split())
    return plain if plain in FIELDS else ALIASES.get(plain, "")
