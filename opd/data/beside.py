"""Finds pictures in the archives beside the rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from opd.data.archive_files import ArchiveFiles
from opd.data.archives import Archive, Unpacked, open_archive
from opd.data.tar import inside
from opd.errors import DataError
from opd.progress import Progress
from opd.types import EncodedImage


class Archives:
    """Archives in which pictures are looked for; safe for threads.

    Each is opened when a picture is first looked for in it; `progress` hears of those that are
    used. `stop` ends unpacking.
    """

    def __init__(
        self, archives: Sequence[ArchiveFiles], progress: Progress, stop: threading.Event
    ) -> None:
        self._archives = archives
        self._progress, self._stop = progress, stop
        self._opened: dict[ArchiveFiles, Archive] = {}
        self._faults: dict[ArchiveFiles, DataError] = {}
        self._told: set[ArchiveFiles] = set()
        self._lock = threading.Lock()

    def find(self, path: str) -> EncodedImage | None:
        """The picture that a row calls `path`; None if no archive holds it.

        Archives whose name is the path's first folder come first: images.zip for images/17.png.
        Archives that must be unpacked come last, and only until one holds the picture. Raises
        DataError if several archives that are read in place hold it.
        """
        name = inside(path)
        if not name or path.startswith("/"):
            return None
        first, others = name.split("/")[0], self._archives
        named = [files for files in others if files.stem == first]
        if found := self._first(named, name):
            return found
        in_place = [files for files in others if not files.packed and files not in named]
        holders = [files for files in in_place if self._find(files, name)]
        if len(holders) > 1:
            both = f"{holders[0]} and {holders[1]}"
            raise DataError(f"'{path}' is in {both}; say which: data.images=ARCHIVE")
        packed = [files for files in others if files.packed and files not in named]
        return self._first(holders or packed, name)

    def missing(self) -> str:
        """What a message about a missing picture says of the archives; empty if there are none."""
        for fault in self._faults.values():
            return str(fault)
        return f"it is not in {', '.join(map(str, self._archives))}" if self._archives else ""

    def _first(self, archives: Sequence[ArchiveFiles], name: str) -> EncodedImage | None:
        """The picture from the first of the archives that holds it."""
        for files in archives:
            if found := self._find(files, name):
                self._tell(files)
                return found
        return None

    def _find(self, files: ArchiveFiles, name: str) -> EncodedImage | None:
        archive = self._open(files)
        return archive.find(name) if archive else None

    def _open(self, files: ArchiveFiles) -> Archive | None:
        """The archive; None if it cannot be read."""
        with self._lock:
            if files not in self._opened and files not in self._faults:
                try:
                    self._opened[files] = open_archive(files, self._progress, self._stop)
                except DataError as error:
                    self._faults[files] = error
            return self._opened.get(files)

    def _tell(self, files: ArchiveFiles) -> None:
        with self._lock:
            new = files not in self._told
            self._told.add(files)
        archive = self._opened[files]
        where = f", unpacked in {archive.folder}" if isinstance(archive, Unpacked) else ""
        if new:
            self._progress.note(f"pictures are read from {files}{where}")
