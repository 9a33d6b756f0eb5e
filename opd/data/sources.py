"""Finds the pictures of a row: turns picture values into image sources.

A picture value is a path, bytes, base64 without a head, a data URI, a URL, {"bytes": bytes, base64
or null, "path": path or null}, {"url": URL or data URI}, or a `Picture`.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.data.archive_files import ArchiveFiles, archive_at, archives_in
from opd.data.beside import Archives
from opd.data.downloads import Downloads
from opd.data.embedded import Embedded, bytes_or_text, is_embedded
from opd.data.fields import Row, show, whole, wrong
from opd.data.images import short
from opd.errors import DataError
from opd.progress import Progress, Quiet
from opd.types import EncodedImage, Picture

WANTED = "a path, bytes, base64 or a URL"
"""A picture value in words."""

SEVERAL = "a list of paths, bytes, base64 or URLs"

LONGEST = 1 << 16
"""Largest number of characters of a path or URL."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


@dataclass(frozen=True)
class Place:
    """The place of a row: `name`, "file:line", the `files` that hold the row, and `again`, which
    reads the row again."""

    name: str
    files: tuple[Path, ...]
    again: Callable[[], Row]


class Sources:
    """Finds the pictures of the rows of a data file; safe for threads.

    Paths are relative to `images`, a folder or an archive; if that is None, to the data file's
    `folder`. A picture that is not a file is looked for in the archives of that folder. `~/` is the
    home folder. Pictures at http and https addresses are downloaded if `allow_download`. `progress`
    hears which archives are used, and `stop` ends unpacking one. Raises DataError if `images` is
    neither a folder nor an archive.
    """

    def __init__(
        self,
        folder: Path,
        images: Path | None = None,
        allow_download: bool = False,
        progress: Progress | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._folder = folder if images is None else images
        self._only: ArchiveFiles | None = None
        if images is not None and not images.is_dir():
            self._only = archive_at(images)
            if self._only is None:
                what = "neither a folder nor an archive" if images.exists() else "not there"
                raise DataError(f"data.images: {images} is {what}")
            self._folder = folder
        self._progress, self._stop = progress or Quiet(), stop or threading.Event()
        self._downloads = Downloads(self._progress) if allow_download else None
        self._archives: Archives | None = None
        self._lock = threading.Lock()

    def of_row(self, row: Row, singular: str, place: Place) -> tuple[EncodedImage, ...]:
        """The picture in field `singular`, or the pictures in the plural of that field; empty if
        both are absent. Raises DataError for a value that is no picture value."""
        plural = f"{singular}s"
        one, several = row.get(singular), row.get(plural)
        if one is not None and several is not None:
            raise DataError(f"fields '{singular}' and '{plural}': give one of them, not both")
        if one is not None:
            return (self._source(one, singular, None, place),)
        if not isinstance(several, list | None):
            raise wrong(plural, several, SEVERAL)
        return tuple(
            self._source(value, plural, index, place) for index, value in enumerate(several or ())
        )

    def _source(self, value: Any, column: str, index: int | None, place: Place) -> EncodedImage:
        """The image source of a picture value in the field `column`."""
        if isinstance(value, Picture):
            return value
        if is_embedded(value):
            where = column if index is None else f"{column}[{index}]"
            return Embedded(f"{place.name} {where}", place.files, place.again, column, index)
        text = bytes_or_text(value)
        if not isinstance(text, str) or not text.strip() or len(text) > LONGEST:
            raise wrong(column, value, WANTED)
        whole(column, text)
        try:
            return self._of_url(text) if _URL.match(text) else self._of_path(text)
        except DataError as error:
            raise DataError(f"field '{column}': {error}") from error

    def _of_url(self, text: str) -> EncodedImage:
        """The picture at an address. Raises DataError if it may not be downloaded."""
        if not text.lower().startswith(("http://", "https://")):
            raise DataError(f"{show(text)} is a URL of a kind that is not read; give a path")
        if self._downloads is None:
            raise DataError(
                f"{show(text)} is a URL; download the picture, and give its path, or let opd do it:"
                " data.allow_download=true"
            )
        return self._downloads.picture(text)

    def _of_path(self, text: str) -> EncodedImage:
        """The file, or the picture in an archive, that a path means; the file's path if neither is
        there and there are no archives. Raises DataError."""
        at_home = text.startswith("~/")
        path = self._folder / (os.path.expanduser(text) if at_home else text)
        if at_home or os.path.isabs(text) or (self._only is None and os.path.isfile(path)):
            return path
        archives = self._beside()
        if found := archives.find(text):
            return found
        if missing := archives.missing():
            raise DataError(f"image not found: {short(text if self._only else path)}; {missing}")
        return path

    def _beside(self) -> Archives:
        """The archives in which pictures are looked for."""
        with self._lock:
            if self._archives is None:
                archives = [self._only] if self._only else archives_in(self._folder)
                self._archives = Archives(archives, self._progress, self._stop)
            return self._archives
