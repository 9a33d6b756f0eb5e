"""JSON: one object a line, or a file that is one array or one object."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from opd.data.fields import Row, cut
from opd.data.jsonl import loads, parse
from opd.data.tables.spans import Spans, lines
from opd.data.tables.table import ROW_BYTES, Entries, Table
from opd.errors import DataError
from opd.paths import read_file

WHOLE_BYTES = 2 * 2**30
"""Largest file that is read whole, as an array or an object: it takes several times as many bytes
of memory."""


OBJECT = "JSON object"
"""The kind of a file that is one object on several lines."""


class JsonLines(Table):
    """JSON lines, of which only the places of the lines are in memory."""

    kind = "JSON lines"

    def __init__(self, spans: Spans) -> None:
        self.path = spans.path
        self.content = [spans.path]
        self._spans = spans

    def __len__(self) -> int:
        return len(self._spans)

    def number(self, place: int) -> int:
        """The number of the line, from 1."""
        return self._spans.number(place)

    def row(self, place: int) -> Row:
        """The object of the line. Raises Malformed if the line is not an object."""
        return parse(self._spans.read(place).decode("utf-8"))


def open_json(path: Path) -> Table:
    """The rows of JSON lines, or of an array; of a file that is one object on several lines, or on
    one line longer than a row, the object is the only row. Raises DataError."""
    spans = lines(path)
    if not len(spans):
        raise DataError(f"{path}: the file is empty")
    start, end = int(spans.starts[0]), int(spans.ends[0])
    first = spans.part(start, min(end - start, 4096)).decode("utf-8", "replace").lstrip()[:1]
    last = spans.part(max(start, end - 4096), min(end - start, 4096)).rstrip()[-1:]
    long = len(spans) == 1 and end - start > ROW_BYTES and path.suffix.lower() == ".json"
    if first == "[" or (first == "{" and (long or (len(spans) > 1 and last != b"}"))):
        whole = _whole(path, spans.size)
        if isinstance(whole, dict):
            return Entries(path, OBJECT, [whole])
        if isinstance(whole, list) and any(isinstance(entry, dict) for entry in whole):
            return Entries(path, "JSON array", whole)
    return JsonLines(spans)  # of another file, every line becomes a faulty row


def inside(table: Table, whole: Mapping[str, object]) -> Table:
    """The rows of the one list of objects in the only row of a table. Raises DataError if it holds
    none, or several."""
    lists = {
        name: value
        for name, value in whole.items()
        if isinstance(value, list) and any(isinstance(entry, dict) for entry in value)
    }
    if len(lists) == 1:
        ((name, entries),) = lists.items()
        return Entries(table.path, f"JSON list '{cut(name)}'", entries).inside(table)
    names = ", ".join(f"'{cut(name)}'" for name in list(whole)[:5])
    several = f", which holds {len(lists)} lists of rows" if lists else ""
    raise DataError(
        f"{table.path}: the file is one JSON object (of {names}){several}, not one a line; write"
        " one list of rows, or one row a line"
    )


def _whole(path: Path, size: int) -> object:
    """The value of a file that is one JSON text; None if it is not. Raises DataError."""
    if size > WHOLE_BYTES:
        raise DataError(
            f"{path}: the file is one JSON text of {size:,} bytes, which would fill the memory;"
            f" write one row a line, such as with: jq -c '.[]' {path.name} > rows.jsonl"
        )
    try:
        return loads(read_file(path).decode("utf-8-sig"))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except (ValueError, RecursionError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
