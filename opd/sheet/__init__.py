"""A contact sheet of a data set: for some rows, what student and teacher will see.

`cards.py` gathers what a row shows; `png.py` draws it, and `page.py` writes it as a web page.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from opd.errors import DataError, RunError
from opd.sheet import page, png
from opd.sheet.cards import Card, cards

__all__ = ["Card", "cards", "check_free", "write"]

MOST_DRAWN = 40
"""Largest number of rows of a PNG: many programs show no picture of more than 65,536 pixels."""

WRITERS = {".png": png.sheet, ".html": page.sheet, ".htm": page.sheet}
"""By suffix: what makes the content of a sheet from its title and its cards."""

MARKS = {".png": png.is_sheet, ".html": page.is_sheet, ".htm": page.is_sheet}
"""By suffix: whether the content of a file is a sheet."""


def check_free(path: Path, count: int) -> None:
    """Raises DataError if no sheet of `count` rows can be written to `path`, or if there is a file
    that is no sheet."""
    suffix = path.suffix.lower()
    if suffix not in WRITERS:
        raise DataError(f"'{path}': a sheet is a picture or a web page; name it .png or .html")
    if suffix == ".png" and count > MOST_DRAWN:
        raise DataError(
            f"a picture of {count} rows would be too tall; take at most {MOST_DRAWN}, or name the"
            " sheet .html"
        )
    if not path.parent.is_dir():
        raise DataError(f"'{path.parent}' is not a folder; make it, or take another one")
    if path.exists() and not (path.is_file() and MARKS[suffix](path)):
        raise DataError(f"'{path}' exists, and is no sheet of opd; take another name")


def write(path: Path, title: str, rows: Iterable[Card]) -> None:
    """Writes a sheet as a whole; a suffix other than .html means PNG. Raises RunError if the disk
    is full."""
    content = WRITERS[path.suffix.lower()](title, rows)
    temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
    try:
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunError(f"'{path}' cannot be written: {error.strerror or error}") from error
