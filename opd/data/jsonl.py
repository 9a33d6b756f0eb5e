"""Parses JSON texts of rows."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from opd.data.fields import Row, cut, kind
from opd.errors import DataError


class Malformed(DataError):
    """A line that is not a row; `line` is its text."""

    def __init__(self, reason: str, line: str) -> None:
        super().__init__(reason)
        self.line = line


def parse(line: str) -> Row:
    """The JSON object of a line. Raises Malformed if the line is not a JSON object, or has a field
    twice."""
    try:
        return as_row(loads(line))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {error}", line) from error
    except DataError as error:
        raise Malformed(str(error), line) from error


def as_row(value: Any) -> Row:
    """Returns `value`. Raises DataError if it is not an object."""
    if not isinstance(value, dict):
        raise DataError(f"a row is a JSON object, but this is {kind(value)}")
    return value


def loads(text: str) -> Any:
    """The value of a JSON text. Raises ValueError or RecursionError for another text, and DataError
    for an object that has a field twice."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of `pairs`. Raises DataError if a name occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DataError(f"field '{cut(twice)}' stands twice in the row")
    return row
