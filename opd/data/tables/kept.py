"""Copies of data files that can be read at random, in the user's cache folder."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from filelock import FileLock

from opd.errors import DataError, one_line
from opd.paths import cache_folder
from opd.progress import Progress

RESERVE = 1 << 30
"""Bytes of the disk that stay free: 1 GiB."""

CHUNK = 1 << 20


def kept_copy(path: Path, suffix: str, make: Callable[[Path, int], None]) -> Path:
    """The copy of a file, made by `make(copy, room)` unless it is there already; `room`: bytes that
    it may have. It is found again while the file has the same size and times.

    Raises DataError if the copy cannot be made.
    """
    folder = cache_folder() / "tables"
    copy = folder / f"{path.name[:40]}-{_key(path)}{suffix}"
    partial = copy.with_name(f"partial-{copy.name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(copy.with_name(f"{copy.name}.lock")):
            if not copy.exists():
                try:
                    make(partial, shutil.disk_usage(folder).free - RESERVE)
                    os.replace(partial, copy)
                finally:
                    with suppress(OSError):
                        partial.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(
            f"{path}: a copy in {folder} cannot be made: {error.strerror or one_line(error)}"
        ) from error
    return copy


def no_room(path: Path, room: int) -> DataError:
    """The DataError for a copy that would be larger than `room` bytes."""
    return DataError(
        f"{path}: it holds more than the {max(0, room) / 1e9:.1f} GB for which {cache_folder()} has"
        " room; unpack it elsewhere, or set $XDG_CACHE_HOME"
    )


def unzipped(path: Path, progress: Progress) -> Path:
    """The content of a gzip'd file. Raises DataError if it is damaged, or too large."""

    def make(copy: Path, room: int) -> None:
        progress.note(f"unpacking {path} into {copy.parent}, once")
        written = 0
        with gzip.open(path) as packed, copy.open("wb") as file:
            while chunk := chunk_of(packed):
                written += len(chunk)
                if written > room:
                    raise no_room(path, room)
                file.write(chunk)

    def chunk_of(packed: gzip.GzipFile) -> bytes:
        try:
            return packed.read(CHUNK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DataError(f"{path}: the file is damaged gzip: {one_line(error)}") from error

    return kept_copy(path, Path(path.stem).suffix, make)


def _key(path: Path) -> str:
    """A name of the file's place and state. Raises DataError."""
    try:
        state = path.stat()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    told = repr((str(path.absolute()), state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    return hashlib.sha256(told.encode("utf-8", "surrogateescape")).hexdigest()[:16]
