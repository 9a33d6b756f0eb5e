"""Reads a JSONL file into numbered lines, and checks the file as a whole."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.data import foreign
from opd.data.fields import cut, kind
from opd.errors import DataError
from opd.paths import read_file


@dataclass(frozen=True)
class Lines:
    """A JSONL file: `content` is the bytes of the file, `rows` the lines that are not blank, with
    their numbers from 1. Entries of a JSON array count as lines.
    """

    path: Path
    content: bytes
    rows: list[tuple[int, str]]


def read_lines(path: Path) -> Lines:
    """The lines of a file. Raises DataError if the file is missing, a folder, unreadable, empty,
    not UTF-8, or in a known format that is not JSON lines."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the data file in it")
    if not path.exists():
        raise DataError(f"data file not found: {path}")
    try:
        content = read_file(path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    foreign.check_file(path, content)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: the file is not UTF-8 text (byte 0x{content[error.start]:02x}); save"
            " it as UTF-8"
        ) from error
    # str.splitlines is not used, since it also splits at separators that JSON allows in strings.
    rows = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return Lines(path, content, _entries(path, text, rows))


def parse(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError if the line is not a JSON object, or has a field
    twice."""
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"a row is a JSON object, but this is {kind(row)}")
    return row


def _entries(path: Path, text: str, rows: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The entries of a JSON array as lines; `rows` if the file is not an array. Raises DataError
    for a file that is one JSON object."""
    first = rows[0][1].strip()
    if first.startswith("["):
        try:
            array = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            return rows  # every line becomes a faulty row
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if any(isinstance(entry, dict) for entry in array):
            return [(number, json.dumps(entry)) for number, entry in enumerate(array, start=1)]
    if len(rows) > 1 and first.startswith("{") and not first.endswith("}"):
        try:
            whole = json.loads(text)
        except (ValueError, RecursionError):
            return rows
        names = ", ".join(f"'{cut(name)}'" for name in list(whole)[:5])
        raise DataError(
            f"{path}: the file is one JSON object (of {names}), not one a line; {foreign.CONVERT}"
        )
    return rows


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dictionary of `pairs`. Raises DataError if a name occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DataError(f"field '{cut(twice)}' stands twice in the row")
    return row
