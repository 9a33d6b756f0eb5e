"""Archives on disk: one file, or the parts of one stream, such as images.tar.gz00 ...
images.tar.gz05."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import IO, Any, cast

from opd.data.image_formats import OTHERS, format_of
from opd.data.images import short
from opd.errors import DataError

_NAME = re.compile(
    r"(?P<whole>(?P<stem>.+?)\.(?:zip|tar\.gz|tgz|tar))"
    r"((?<!zip)\.?(?:part)?[-_.]?(?P<part>\d{1,4}|(?!bz|br)[a-j][a-z]))?",
    re.IGNORECASE,
)
"""The name of an archive, or of a part of one: images.zip, images.tar.gz, images.tar.gz03,
images.tar.part-ab."""

_START = 512
"""Number of bytes at the beginning of an archive by which its kind is recognised."""


@dataclass(frozen=True)
class ArchiveFiles:
    """The files of an archive, in the order of their stream."""

    files: tuple[Path, ...]

    @property
    def stem(self) -> str:
        """The name without the suffix: "images" of images.tar.gz00."""
        match = _NAME.fullmatch(self.files[0].name)
        return match["stem"] if match else self.files[0].stem

    @property
    def packed(self) -> bool:
        """Whether the archive cannot be read at random, by its name."""
        return len(self.files) > 1 or self.files[0].suffix.lower() not in (".zip", ".tar")

    def kind(self) -> str:
        """One of "zip", "tar" and "gzip", by the content. Raises DataError for any other, and if a
        part is missing."""
        _check_parts(self.files)
        try:
            with self.open() as file:
                start = file.read(_START)
        except OSError as error:
            raise DataError(f"{self} cannot be read: {error.strerror}") from error
        if start.startswith(b"\x1f\x8b"):
            return "gzip"
        if start.startswith((b"PK\x03\x04", b"PK\x05\x06")):
            return "zip"
        if start[257:262] == b"ustar":
            return "tar"
        what = "another kind of file, or damaged" if start else "an empty file"
        raise DataError(f"{self} is neither zip nor tar: {OTHERS.get(format_of(start), what)}")

    def open(self) -> IO[bytes]:
        """The content of all files, one after the other. Raises OSError."""
        if len(self.files) == 1:
            return self.files[0].open("rb")
        return cast("IO[bytes]", BufferedReader(_Joined(self.files)))

    def __str__(self) -> str:
        first, *others = self.files
        return f"{short(first)} ... {others[-1].name}" if others else short(first)


def archives_in(folder: Path) -> list[ArchiveFiles]:
    """The archives in a folder by name. Parts of one stream are one archive."""
    groups: defaultdict[tuple[str, bool], list[Path]] = defaultdict(list)
    try:
        files = sorted(folder.iterdir())
    except OSError:
        return []
    for file in files:
        match = _NAME.fullmatch(file.name)
        if match and file.is_file():
            groups[match["whole"], match["part"] is not None].append(file)
    return [ArchiveFiles(tuple(sorted(parts, key=_part))) for _, parts in sorted(groups.items())]


def archive_at(path: Path) -> ArchiveFiles | None:
    """The archive that a person means by a path, which may be one of its parts, or their name
    without numbers; None if the path is no archive."""
    if path.is_dir():
        return None
    for archive in archives_in(path.parent):
        name = _NAME.fullmatch(archive.files[0].name)
        if path in archive.files or (name and name["whole"] == path.name):
            return archive
    return None


def _part(file: Path) -> int:
    """The number of a part: 3 of images.tar.gz03, 1 of images.tar.gzab; -1 of a whole archive."""
    match = _NAME.fullmatch(file.name)
    part = match["part"].lower() if match and match["part"] else ""
    if part.isdigit():
        return int(part)
    return (ord(part[0]) - ord("a")) * 26 + ord(part[1]) - ord("a") if part else -1


def _check_parts(files: tuple[Path, ...]) -> None:
    """Raises DataError if a part before the last one is missing. Numbers begin at 0 or 1."""
    for before, file in zip((None, *files), files, strict=False):
        number = _part(file)
        expected = {-1, 0, 1} if before is None else {_part(before) + 1}
        if number not in expected:
            raise DataError(f"{short(file)}: the part before it is missing")


class _Joined(RawIOBase):
    """The content of several files, one after the other."""

    def __init__(self, files: tuple[Path, ...]) -> None:
        self._rest = list(files)
        self._file: IO[bytes] | None = None
        self._place = 0

    def readable(self) -> bool:
        """True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fills `buffer` from the current file; 0 at the end of the last one."""
        while self._file or self._rest:
            self._file = self._file or self._rest.pop(0).open("rb")
            if content := self._file.read(len(buffer)):
                buffer[: len(content)] = content
                self._place += len(content)
                return len(content)
            self._file.close()
            self._file = None
        return 0

    def tell(self) -> int:
        """The number of bytes that were read."""
        return self._place

    def close(self) -> None:
        """Closes the current file."""
        if self._file:
            self._file.close()
        super().close()
