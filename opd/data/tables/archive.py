"""Archives that hold the rows beside their pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from opd.data.archive_files import ArchiveFiles
from opd.data.archives import Archive, Indexed, Unpacked, open_archive
from opd.data.tables.folder import ABOUT, DATA, LISTED, suffix_of
from opd.data.tables.kept import kept_copy, no_room
from opd.data.tables.table import Table
from opd.errors import DataError, one_line
from opd.progress import Progress


def open_rows_of(
    files: ArchiveFiles,
    progress: Progress,
    open_file: Callable[[Path], Table],
    open_folder: Callable[[Path], Table],
) -> Table:
    """The rows in an archive, whose pictures are looked for in it. An archive that cannot be read
    in place is unpacked once, and read as a folder. Raises DataError."""
    archive = open_archive(files, progress, threading.Event())
    if isinstance(archive, Unpacked):
        return open_folder(archive.folder / archive.top)
    assert isinstance(archive, Indexed), "archives are read in place or unpacked"
    name = _data_file(files, archive)

    def make(copy: Path, room: int) -> None:
        try:
            content = archive.read(name)
        except MemoryError:
            raise
        except Exception as error:  # damaged archives raise errors of many classes
            raise DataError(f"{files}/{name} cannot be read: {one_line(error)}") from error
        if len(content) > room:
            raise no_room(files.files[0], room)
        copy.write_bytes(content)

    path = files.files[0]
    copy = kept_copy(path, f"-{PurePosixPath(name).name}", make)
    try:
        table = open_file(copy)
    except DataError as error:
        raise DataError(str(error).replace(str(copy), f"{path}/{name}")) from error
    table.path, table.content, table.images = path / name, [path], path
    return table


def _data_file(files: ArchiveFiles, archive: Archive) -> str:
    """The name of the one data file in an archive. Raises DataError."""
    names = [
        name
        for name in sorted(archive.names())
        if suffix_of(Path(name)) in DATA
        and Path(name).name not in ABOUT
        and not Path(name).name.startswith(".")
    ]
    if len(names) == 1:
        return names[0]
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    listed = ", ".join(names[:LISTED]) + more
    raise DataError(
        f"{files} holds {f'several data files: {listed}' if names else 'no data file'}; unpack it,"
        " and name the file or folder that holds the rows"
    )
