"""Tables: data files as numbered rows, each read when it is needed.

`open_table` opens a file of any kind. A new kind is a file in this folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from opd.data import foreign
from opd.data.archive_files import ArchiveFiles, archive_at
from opd.data.reading import Reading
from opd.data.tables.archive import open_rows_of
from opd.data.tables.delimited import is_header, open_delimited
from opd.data.tables.folder import open_folder
from opd.data.tables.hub import is_id, is_saved, open_hub
from opd.data.tables.json_lines import open_json
from opd.data.tables.kept import unzipped
from opd.data.tables.parquet import Parquet
from opd.data.tables.table import Table
from opd.errors import DataError
from opd.paths import read_start
from opd.progress import Progress

__all__ = ["Table", "open_table"]

GZIP, PARQUET, POINTER = b"\x1f\x8b", b"PAR1", b"version https://git-lfs"

START = 65_536
"""Number of bytes at the beginning of a file by which its kind is recognised."""


def open_table(path: Path, reading: Reading, progress: Progress) -> Table:
    """The rows of a data file, a folder, an archive, or a Hugging Face data set. Raises DataError,
    of one line, if it cannot be used."""

    def file(path: Path) -> Table:
        return open_file(path, progress)

    def folder(path: Path) -> Table:
        if is_saved(path):
            return open_hub(path, reading.split, reading.revision, progress)
        return open_folder(path, reading.split, file, archive)

    def archive(files: ArchiveFiles) -> Table:
        return open_rows_of(files, progress, file, folder)

    if path.is_dir():
        return folder(path)
    if re.search(r"\.(zip|tar|tgz)", path.name.lower()) and (files := archive_at(path)):
        return archive(files)
    if path.exists():
        return file(path)
    if is_id(path):
        return open_hub(path, reading.split, reading.revision, progress)
    raise DataError(f"data file not found: {path}")


def open_file(path: Path, progress: Progress) -> Table:
    """The rows of a data file. Raises DataError."""
    start, suffix = read_start(path, START), path.suffix.lower()
    if start.startswith(GZIP):
        return _unzipped(path, progress)
    if start.startswith(POINTER):
        raise DataError(f"{path} is a pointer of Git LFS and not the file; fetch it: git lfs pull")
    if start.startswith(PARQUET) or suffix == ".parquet":
        return Parquet(path, progress)
    foreign.check_file(path, start)
    first = start.decode("utf-8-sig", "replace").lstrip().split("\n", 1)[0].strip()
    if suffix in (".csv", ".tsv") or (first[:1] not in ("{", "[") and is_header(first)):
        return open_delimited(path)
    return open_json(path)


def _unzipped(path: Path, progress: Progress) -> Table:
    """The rows of a gzip'd data file."""
    copy = unzipped(path, progress)
    try:
        table = open_file(copy, progress)
    except DataError as error:
        raise DataError(str(error).replace(str(copy), str(path))) from error
    table.path, table.content = path, [path]
    return table
