"""Chooses the format of a data file, by its first rows or by what a person says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from opd.data import formats
from opd.data.fields import Row
from opd.data.formats.columns import Columns, check_columns, check_complete, usual
from opd.data.formats.format import FileFormat, Format, OfTable, Rows, WholeFormat
from opd.data.formats.mapped import is_own
from opd.data.reading import Reading
from opd.data.survey import check_unit, survey
from opd.data.tables import open_table
from opd.data.tables.json_lines import OBJECT, inside
from opd.data.tables.table import Entries, Table
from opd.errors import DataError, nearest, plural
from opd.paths import read_start
from opd.progress import Progress

START = 65_536
"""Number of bytes at the beginning of a file that `FileFormat.recognise` gets."""

HEAD = 32
"""Number of rows that show the format."""

NO_COLUMNS: Mapping[str, str] = {}

OWN = "opd"
"""The name of our own format in `data.format`."""


def rows_of(path: Path, reading: Reading, progress: Progress) -> Rows:
    """The rows of a data file with our fields. Raises DataError if the file cannot be used, or if
    its format is unknown or ambiguous."""
    named = _named(reading.format)
    start = read_start(path, START)
    for other in formats.REGISTERED.values():
        if isinstance(other, FileFormat) and (
            other is named or (not reading.format and other.recognise(path, start))
        ):
            rows = other.read(path)
            notes = [_read_as(path, other.name, len(rows.rows)), *rows.notes]
            return replace(rows, notes=notes, format=other.name)
    table = open_table(path, reading, progress)
    head = list(_readable(table))
    if len(table) == 1 and head:
        whole = _whole(head[0], named)
        if whole:
            entries = Entries(path, table.kind, whole.to_rows(head[0])).inside(table)
            return _rows(entries, OfTable(entries, dict), whole)
        if not named and _holds_rows(table, head[0]):
            table = inside(table, head[0])
            head = list(_readable(table))
    if isinstance(named, WholeFormat):
        raise DataError(f"{path}: {named.name} is a file of one JSON object")
    if named or not (reading.columns or reading.format):
        reader = named or _recognised(path, head)
        if reader and not isinstance(reader, FileFormat):
            return _foreign(table, head, reader, reading)
    return _own(table, head, reading)


def _named(name: str) -> Format | FileFormat | WholeFormat | None:
    """The format that `data.format` names; None for our own, or if it names none. Raises DataError
    for an unknown name."""
    known: dict[str, Format | FileFormat | WholeFormat] = {
        getattr(reader, "key", "") or reader.name: reader
        for reader in (
            *formats.BUILT_IN,
            *formats.NAMED,
            *formats.WHOLE,
            *formats.REGISTERED.values(),
        )
    }
    if name in ("", OWN):
        return None
    if name not in known:
        raise DataError(f"data.format = {name!r}: unknown; {nearest(name, [OWN, *known])}")
    return known[name]


def _whole(row: Row, named: object) -> WholeFormat | None:
    """The format of a file that is the object `row`; None if it is not of such a format."""
    if named:
        return named if isinstance(named, WholeFormat) else None
    return next((reader for reader in formats.WHOLE if reader.matches(row)), None)


def _holds_rows(table: Table, row: Row) -> bool:
    """Whether the only row of a table is an object that holds the rows in a list."""
    if is_own(row) or {"question", "image", "boxes", "box_format"} & row.keys():
        return False
    if any(reader.matches(row) for reader in _row_formats()):
        return False
    lists = [value for value in row.values() if isinstance(value, list)]
    objects = [entry for entries in lists for entry in entries[:1] if isinstance(entry, dict)]
    return table.kind == OBJECT or len(objects) == 1


def _row_formats() -> list[Format]:
    """The formats of rows that are recognised, in the order in which they are tried."""
    registered = [
        reader for reader in formats.REGISTERED.values() if not isinstance(reader, FileFormat)
    ]
    return [*registered, *formats.BUILT_IN]


def _recognised(path: Path, head: Sequence[Row]) -> Format | None:
    """The format that matches most of the first rows; None for our own, which is also taken where
    no format matches. Raises DataError if several match the same rows."""
    votes = [[None] if is_own(row) else _matching(row) for row in head]
    counts = Counter(reader for vote in votes for reader in vote)
    if not counts:
        return None
    most = max(counts.values())
    best = [reader for reader, count in counts.items() if count == most]
    # Of formats with equally many rows, those of the earliest row are left.
    first = next(vote for vote in votes if set(vote) & set(best))
    left = [reader for reader in best if reader in first]
    if len(left) > 1:
        keys = [f"--set data.format={reader.key}" for reader in left if reader]
        names = [reader.name for reader in left if reader]
        raise DataError(
            f"{path}: the rows may be {' or '.join(names)}; say which: {' or '.join(keys)}"
        )
    return left[0]


def _matching(row: Row) -> list[Format]:
    """The formats that match a row, without those whose marks are among those of another that
    matches. A registered format that matches is taken alone."""
    matching = [reader for reader in _row_formats() if reader.matches(row)]
    if matching and matching[0] in formats.REGISTERED.values():
        return matching[:1]
    return [
        reader
        for reader in matching
        if not any(set(reader.marks) < set(other.marks) for other in matching)
    ]


def _foreign(table: Table, head: Sequence[Row], reader: Format, reading: Reading) -> Rows:
    """The rows of a table in the format `reader`, with the columns that a person names."""
    check_columns(table, head, reading.columns)
    columns = Columns(reading.columns)

    def to_own(row: Row) -> Row:
        return {**reader.own(row), **columns.named(row)}

    return _rows(table, OfTable(table, to_own), reader, reading.columns)


def _own(table: Table, head: Sequence[Row], reading: Reading) -> Rows:
    """The rows of a table as our own."""
    check_columns(table, head, reading.columns)
    columns, notes = usual(table, reading.columns)
    check_complete(table, columns, reading.question)
    surveyed = survey(table, columns.own)

    def to_own(row: Row) -> Row:
        own = columns.own(row)
        check_unit(own)  # not every row of a large file has been surveyed
        return own

    rows = _rows(table, OfTable(table, to_own, int(surveyed.header)), None, columns.names)
    if not table.kind.startswith("JSON"):
        notes = [_read_as(table.path, rows.format, len(rows.rows)), *notes]
    notes = [*table.notes, *notes, *surveyed.notes]
    return replace(rows, notes=notes, box_format=surveyed.box_format)


def _rows(
    table: Table,
    rows: OfTable,
    reader: Format | WholeFormat | None,
    columns: Mapping[str, str] = NO_COLUMNS,
) -> Rows:
    """The rows of a table with our fields, as the format `reader` gives them; None: our own."""
    found = Rows(
        table.path,
        table.content,
        rows,
        names=columns,
        folder=table.folder,
        images=table.images,
        store=table.store,
    )
    if reader is None:
        return found
    return replace(
        found,
        box_format=reader.box_format,
        notes=[*table.notes, _read_as(table.path, reader.name, len(rows))],
        names={**reader.names, **columns},
        format=reader.name,
    )


def _readable(table: Table) -> Iterator[Row]:
    """The first rows of a table that are not faulty."""
    for place in range(min(len(table), HEAD)):
        with suppress(DataError):
            yield table.row(place)


def _read_as(path: Path, name: str, rows: int) -> str:
    """The line that says in which format a file is read."""
    return f"{path}: read as {name}: {plural(rows, 'row')}"
