"""A JSONL file as numbered lines; whatever is wrong with the whole file is found here."""

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
    """The lines of a file that are not blank, with their numbers from 1, and the file's bytes.

    Entries of a JSON array count as lines.
    """

    path: Path
    content: bytes
    rows: list[tuple[int, str]]


def read_lines(path: Path) -> Lines:
    """Raises DataError where the file is missing, a folder, unreadable, empty, not UTF-8, or of a
    format that is not read."""
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
    # Only "\n" ends a row: str.splitlines would also cut at separators that JSON allows inside
    # strings.
    rows = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return Lines(path, content, _entries(path, text, rows))


def parse(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError, also where a field stands in it twice."""
    try:
        row = json.loads(line, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"a row is a JSON object, but this is {kind(row)}")
    return row


def _entries(path: Path, text: str, rows: list[tuple[int, str]]) -> list[tuple[int, str]]:
    """The entries of a JSON array, or the lines as they are. Raises DataError for one object over
    many lines."""
    first = rows[0][1].strip()
    if first.startswith("["):
        try:
            found = json.loads(text, object_pairs_hook=_once)
        except (ValueError, RecursionError):
            return rows  # each line is told as a faulty row
        except DataError as error:
            raise DataError(f"{path}: {error}") from error
        if any(isinstance(entry, dict) for entry in found):
            return [(number, json.dumps(entry)) for number, entry in enumerate(found, start=1)]
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
    row = dict(pairs)
    if len(row) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise DataError(f"field '{cut(twice)}' stands twice in the row")
    return row
