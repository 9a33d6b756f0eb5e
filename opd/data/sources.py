"""Finds the pictures of a row: turns picture values into image sources.

A picture value is a path, bytes, base64 without a head, a data URI, a URL, {"bytes": bytes, base64
or null, "path": path or null}, {"url": URL or data URI}, or a `Picture`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd.data.embedded import Embedded, bytes_or_text, is_embedded
from opd.data.fields import Row, show, whole, wrong
from opd.errors import DataError
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


@dataclass(frozen=True)
class Sources:
    """Finds the pictures of rows; safe for threads. Paths are relative to `folder`; `~/` is the
    home folder."""

    folder: Path

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
        if _URL.match(text):
            raise DataError(
                f"field '{column}': {show(text)} is a URL; download the picture, and give its path"
            )
        return self.folder / (os.path.expanduser(text) if text.startswith("~/") else text)
