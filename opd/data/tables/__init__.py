"""Tables: data files as numbered rows, each read when it is needed.

`open_table` opens a file of any kind. A new kind is a file in this folder.
"""

from __future__ import annotations

from pathlib import Path

from opd.data import foreign
from opd.data.reading import Reading
from opd.data.tables.json_lines import open_json
from opd.data.tables.table import Table
from opd.errors import DataError
from opd.paths import read_start
from opd.progress import Progress

__all__ = ["Table", "open_table"]

START = 65_536
"""Number of bytes at the beginning of a file by which its kind is recognised."""


def open_table(path: Path, reading: Reading, progress: Progress) -> Table:
    """The rows of a data file. Raises DataError, of one line, if it cannot be used."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the data file in it")
    if not path.exists():
        raise DataError(f"data file not found: {path}")
    foreign.check_file(path, read_start(path, START))
    return open_json(path)
