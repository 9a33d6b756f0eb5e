"""A JSONL file as numbered lines; whatever is wrong with the whole file is found here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.data.fields import kind
from opd.errors import DataError


@dataclass(frozen=True)
class Lines:
    """The lines of a file that are not blank, with their numbers from 1, and the file's bytes."""

    path: Path
    content: bytes
    rows: list[tuple[int, str]]


def read_lines(path: Path) -> Lines:
    """Raises DataError where the file is missing, a folder, unreadable, empty or not UTF-8."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the data file in it")
    if not path.exists():
        raise DataError(f"data file not found: {path}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: the file is not UTF-8 text (byte 0x{content[error.start]:02x}); save it as UTF-8") from error
    # Only "\n" ends a row: str.splitlines would also cut at separators that JSON allows inside strings.
    rows = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not rows:
        raise DataError(f"{path}: the file is empty")
    return Lines(path, content, rows)


def parse(line: str) -> dict[str, Any]:
    """The JSON object of a line. Raises DataError."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"a row is a JSON object, but this is {kind(row)}")
    return row
