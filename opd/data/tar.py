"""Reads the table of contents of a tar archive from a person or from the network, within bounds."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from tarfile import TarFile, TarInfo
from typing import IO, Any, cast

from opd.errors import DataError

MAX_MEMBERS = 1_000_000
"""Largest number of members of an archive."""

HEADERS = 1 << 20
"""Largest size in bytes of the headers of one member."""


class Bounded:
    """A file of which at most `left` more bytes are read, until `left` is set anew. So a header
    that asks for gigabytes is refused. `last` is what was read last."""

    def __init__(self, file: IO[bytes], left: int) -> None:
        self.file, self.left, self.last = file, left, b""

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes; all if `size` is negative. Raises DataError above `left`."""
        if size > self.left:
            raise DataError(f"it asks for {size:,} bytes of headers")
        self.last = self.file.read(self.left + 1 if size < 0 else size)
        self.left -= len(self.last)
        if self.left < 0:
            raise DataError("its headers are too large")
        return self.last

    def seek(self, offset: int, whence: int = 0) -> int:
        """Moves to a place in the file; in a file that can only be read on, to a later one."""
        if self.file.seekable():
            return self.file.seek(offset, whence)
        while (gap := offset - self.file.tell()) > 0 and self.file.read(min(gap, 1 << 20)):
            pass
        return self.file.tell()

    def tell(self) -> int:
        """The place in the file."""
        return self.file.tell()

    def seekable(self) -> bool:
        """True: archives are opened from files."""
        return True


def tar_members(file: Bounded) -> Iterator[tuple[TarFile, TarInfo]]:
    """The members of a tar archive, one after the other, each with the archive from which it can be
    extracted while it is at hand.

    Raises DataError for an archive that is cut off, damaged, or has more than MAX_MEMBERS, and
    errors of tarfile and of the file.
    """
    file.left = HEADERS
    archive = TarFile(fileobj=cast("IO[bytes]", file))
    count, before = 0, -1
    while (member := archive.next()) is not None:
        cast("Any", archive).members.clear()  # which would hold a kilobyte for each
        count += 1
        if count > MAX_MEMBERS:
            raise DataError(f"it has more than {MAX_MEMBERS:,} members; unpack it")
        if member.size < 0 or archive.offset <= before:
            raise DataError("it is damaged: a member has no size")
        before = archive.offset
        yield archive, member
        file.left = HEADERS
    if file.last.strip(b"\0"):  # tarfile ends without a word at a header that it cannot read
        raise DataError("it is damaged or cut off")


def inside(name: str) -> str:
    """The path of a member within its archive, with "/" and without "."; empty if it leads out of
    the archive, or is empty."""
    path = posixpath.normpath(name.replace("\\", "/").lstrip("/")) if name else "."
    return "" if path == "." or path.split("/")[0] == ".." or "\0" in path else path
