"""Unpacks gzip'd tar archives into the user's cache folder, once."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, cast

from filelock import FileLock, Timeout

from opd.data.archive_files import ArchiveFiles
from opd.data.tar import HEADERS, Bounded, inside, tar_members
from opd.errors import DataError, plural
from opd.paths import cache_folder
from opd.progress import Progress

RESERVE = 1 << 30
"""Bytes of the disk that stay free: 1 GiB."""

TOLD_EVERY = 15.0
"""Seconds between two lines about how far unpacking has come."""

PADDING = 1 << 24
"""Largest number of bytes after the last member."""

UNUSABLE = {errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.ENOTDIR, errno.EISDIR}
"""Error numbers of names that the file system does not take. Such members are left out."""


def unpacked(archive: ArchiveFiles, progress: Progress, stop: threading.Event) -> Path:
    """The folder in the user's cache that holds all files of a gzip'd tar archive.

    It is found again while the archive has the same size and times. Links, devices and members
    outside of the archive are left out. Raises DataError if the disk is too small, or cannot be
    written, and once `stop` is set; and an error of any class if the archive is damaged.
    """
    folder = cache_folder() / "archives" / f"{archive.stem[:40]}-{_key(archive)}"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f"{folder.name}.lock"), stop):
            if not folder.is_dir():
                _unpack(archive, folder, progress, stop)
    except OSError as error:
        if error.errno is None:  # of gzip, whose checksum differs
            raise
        raise DataError(f"unpacking into {folder.parent} failed: {error.strerror}") from error
    return folder


def _unpack(archive: ArchiveFiles, folder: Path, progress: Progress, stop: threading.Event) -> None:
    """Fills `folder`, which appears as a whole at the end."""
    partial, began = folder.with_name(f"{folder.name}.partial"), time.monotonic()
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        size = sum(file.stat().st_size for file in archive.files)
        progress.note(f"unpacking {archive} ({_gigabytes(size)}) into {folder}, once")
        files, written, left_out = _extract(archive, partial, size, progress, stop)
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    others = f"; {plural(left_out, 'member')} left out, which are no files" if left_out else ""
    progress.note(
        f"unpacked {archive}: {plural(files, 'file')}, {_gigabytes(written)}, in"
        f" {time.monotonic() - began:.0f} s{others}"
    )


def _extract(
    archive: ArchiveFiles, folder: Path, size: int, progress: Progress, stop: threading.Event
) -> tuple[int, int, int]:
    """Extracts all files of an archive of `size` bytes. Returns the number of files, their bytes,
    and the number of members that were left out."""
    room = shutil.disk_usage(folder).free - RESERVE
    files = written = left_out = 0
    told = time.monotonic()
    with archive.open() as packed, _stream(packed, archive.kind()) as stream:
        bounded = Bounded(stream, HEADERS)
        for tar, member in tar_members(bounded):
            if stop.is_set():
                raise DataError("unpacking was stopped")
            if member.isdir():
                continue
            written += member.size
            if written > room:
                raise DataError(
                    f"it holds more than the {_gigabytes(room)} for which {folder.parent} has room;"
                    " unpack it elsewhere, and say where: data.images=FOLDER"
                )
            if not member.isreg() or member.issparse() or not inside(member.name):
                left_out += 1
                continue
            bounded.left = member.size + HEADERS
            try:
                member.name = inside(member.name)
                tar.extract(member, folder, set_attrs=False, filter="data")
                files += 1
            except OSError as error:
                if error.errno not in UNUSABLE:
                    raise
                left_out += 1
            if time.monotonic() - told > TOLD_EVERY:
                told = time.monotonic()
                progress.note(f"unpacking {archive}: {100 * packed.tell() // size} %")
        # The end of the stream has a checksum; after it archives hold a few blocks of zeros.
        bounded.left = PADDING
        bounded.read()
    return files, written, left_out


def _stream(packed: IO[bytes], kind: str) -> IO[bytes]:
    """The tar archive in an open file of this kind."""
    return cast("IO[bytes]", gzip.GzipFile(fileobj=packed)) if kind == "gzip" else packed


@contextmanager
def _locked(path: Path, stop: threading.Event) -> Iterator[None]:
    """Holds a lock, so that of several processes one unpacks and the others wait. Raises DataError
    once `stop` is set."""
    lock = FileLock(path)
    while not lock.is_locked:
        if stop.is_set():
            raise DataError("waiting for another process that unpacks it was stopped")
        with suppress(Timeout):
            lock.acquire(timeout=1)
    try:
        yield
    finally:
        lock.release()


def _key(archive: ArchiveFiles) -> str:
    """A name of the archive's place and state."""
    states = [(str(file.absolute()), file.stat()) for file in archive.files]
    state = [(path, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for path, stat in states]
    return hashlib.sha256(repr(state).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _gigabytes(size: int) -> str:
    return f"{max(0, size) / 1e9:.1f} GB" if size >= 1e8 else f"{max(0, size) / 1e6:.1f} MB"
