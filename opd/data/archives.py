"""Pictures in archives: zip, tar and gzip'd tar, also in parts of one stream.

Members of zip and tar are read in place, by an index that is made once. A gzip'd tar cannot be read
at random, so it is unpacked once into the user's cache folder (`opd.data.unpack`).
"""

from __future__ import annotations

import os
import posixpath
import threading
import weakref
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, cast

from opd.data.archive_files import ArchiveFiles
from opd.data.embedded import MAX_BYTES
from opd.data.images import short
from opd.data.tar import HEADERS, MAX_MEMBERS, Bounded, inside, tar_members
from opd.data.unpack import unpacked
from opd.errors import DataError, one_line
from opd.progress import Progress
from opd.types import EncodedImage, Picture

DIRECTORY = 1 << 27
"""Largest table of contents of a zip archive in bytes: 128 MiB, of about a million members."""

JUNK = "__MACOSX/"
"""The folder in which a Mac's archives hold what is not a file of the person's."""


class Archive(ABC):
    """The files in an archive, by their paths in it with "/"; safe for threads. `shown` is the
    archive's name for messages, `stem` the name without its suffix."""

    def __init__(self, files: ArchiveFiles) -> None:
        self.shown, self.stem = str(files), files.stem

    @abstractmethod
    def names(self) -> Collection[str]:
        """The paths of all files in the archive, such as "images/17.png"."""

    @abstractmethod
    def get(self, name: str) -> EncodedImage | None:
        """The picture with exactly this path; None if there is none."""

    @property
    @abstractmethod
    def top(self) -> str:
        """The path of the folder that holds all files of the archive; empty if there is none."""

    def find(self, name: str) -> EncodedImage | None:
        """The picture that a row calls `name`; None if there is none.

        The path counts from the top of the archive, or from a folder that holds all its files, and
        may begin with the archive's own name without its suffix.
        """
        folders = self.top.split("/") if self.top else []
        starts = ["", *("/".join(folders[: count + 1]) for count in range(len(folders)))]
        for path in dict.fromkeys([name, name.removeprefix(f"{self.stem}/")]):
            for start in starts:
                if picture := self.get(posixpath.join(start, path)):
                    return picture
        return None


class Indexed(Archive):
    """An archive whose files are read in place."""

    def __init__(self, files: ArchiveFiles, names: Collection[str]) -> None:
        super().__init__(files)
        self._files, self._names = files.files, names
        # The folder of the first and the last path in order is the folder of all paths.
        ends = min(names, default=""), max(names, default="")
        self._top = posixpath.commonpath([posixpath.dirname(end) for end in ends])

    def names(self) -> Collection[str]:
        """The paths of all files in the archive."""
        return self._names

    def get(self, name: str) -> Member | None:
        """The picture with exactly this path; None if there is none."""
        shown = f"{self._files[0].name}/{name}"
        return Member(shown, self._files, self, name) if name in self._names else None

    @property
    def top(self) -> str:
        """The path of the folder that holds all files of the archive; empty if there is none."""
        return self._top

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The content of a file. Raises an error of any class if the archive is damaged."""


@dataclass(frozen=True)
class Member(Picture):
    """A picture in an archive that is read in place."""

    archive: Indexed = field(compare=False, repr=False)
    member: str = field(compare=False)

    def read(self) -> bytes:
        """The content. Raises DataError."""
        try:
            return self.archive.read(self.member)
        except MemoryError:
            raise
        except Exception as error:  # damaged archives raise errors of many classes
            raise DataError(f"image cannot be read: {short(self)}: {one_line(error)}") from error


class Zip(Indexed):
    """A zip archive."""

    def __init__(self, files: ArchiveFiles) -> None:
        file = files.files[0].open("rb")
        weakref.finalize(self, file.close)
        bounded = Bounded(file, DIRECTORY)
        self._zip = zipfile.ZipFile(cast("IO[bytes]", bounded))
        self._infos = {
            name: info
            for info in self._zip.infolist()
            if not info.is_dir() and (name := inside(info.filename)) and not name.startswith(JUNK)
        }
        if len(self._infos) > MAX_MEMBERS:
            raise DataError(f"it has more than {MAX_MEMBERS:,} members; unpack it")
        super().__init__(files, self._infos)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises an error of any class if the archive is damaged."""
        info = self._infos[name]
        _check_size(info.file_size)
        if info.flag_bits & 1:
            raise DataError("it is encrypted; unpack the archive")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError("it is compressed in a way that is not read; unpack the archive")
        with self._zip.open(info) as member:
            # In pieces, since the size that the archive states may be wrong.
            return b"".join(iter(lambda: member.read(1 << 20), b""))


class Tar(Indexed):
    """A tar archive that is not compressed, in one file."""

    def __init__(self, files: ArchiveFiles) -> None:
        self._places: dict[str, tuple[int, int]] = {}
        with files.files[0].open("rb") as file:
            for _, member in tar_members(Bounded(file, HEADERS)):
                name = inside(member.name)
                if member.isreg() and not member.issparse() and name:
                    self._places[name] = member.offset_data, member.size
        super().__init__(files, self._places)

    def read(self, name: str) -> bytes:
        """The content of a file. Raises DataError and OSError."""
        offset, size = self._places[name]
        _check_size(size)
        with self._files[0].open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) < size:
            raise DataError("the archive is cut off")
        return content


class Unpacked(Archive):
    """The folder into which an archive was unpacked."""

    def __init__(self, files: ArchiveFiles, folder: Path) -> None:
        super().__init__(files)
        self.folder = folder
        self._top = folder
        while len(inner := [*self._top.iterdir()]) == 1 and inner[0].is_dir():
            self._top = inner[0]

    def names(self) -> Collection[str]:
        """The paths of all files in the archive."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return [path.relative_to(self.folder).as_posix() for path in files]

    def get(self, name: str) -> Path | None:
        """The file with exactly this path; None if there is none."""
        path = self.folder / name
        return path if os.path.isfile(path) else None

    @property
    def top(self) -> str:
        """The path of the folder that holds all files of the archive; empty if there is none."""
        top = self._top.relative_to(self.folder).as_posix()
        return "" if top == "." else top


def open_archive(files: ArchiveFiles, progress: Progress, stop: threading.Event) -> Archive:
    """Opens an archive; a gzip'd tar, and parts, are unpacked into the user's cache folder first.

    `stop` ends unpacking. Raises DataError for a file that is no archive, or is damaged or cut off.
    """
    kind = files.kind()
    try:
        if kind == "gzip" or len(files.files) > 1:
            return Unpacked(files, unpacked(files, progress, stop))
        return Zip(files) if kind == "zip" else Tar(files)
    except MemoryError:
        raise
    except Exception as error:  # damaged archives raise errors of many classes
        raise DataError(f"{files} cannot be read: {_reason(error, files)}") from error


def _reason(error: Exception, files: ArchiveFiles) -> str:
    """The error of a damaged archive in one line."""
    if isinstance(error, EOFError):
        return "it is cut off" + (", or its last part is missing" if len(files.files) > 1 else "")
    return one_line(error)


def _check_size(size: int) -> None:
    """Raises DataError for a member of more than MAX_BYTES."""
    if size > MAX_BYTES:
        raise DataError(f"{size:,} bytes, above {MAX_BYTES:,}; unpack the archive")
