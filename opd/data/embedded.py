"""Pictures inside the rows of a data file: as bytes, as base64 with or without a head, and as data
URIs.

An `Embedded` picture holds the place of the row and reads the row again when it is opened, so that
no content stays in memory.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

from opd.data.images import short
from opd.errors import DataError
from opd.types import Picture

MAX_BYTES = 1 << 29
"""Largest encoded picture in bytes, outside of files of their own: 512 MiB, which an uncompressed
RGB picture of `MAX_IMAGE_PIXELS` has."""

SNIFFED = 64
"""Number of characters at the beginning of a text by which a picture in base64 is recognised."""

SHORTEST = 40
"""A text of fewer characters is a path and not base64."""

LONG = 1024
"""A text of at least this many characters is base64 if it has the letters of base64 and does not
look like a path, whatever it encodes."""

_SIGNATURES = re.compile(
    rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|BM....\0\0\0\0|II\*\0|MM\0\*|....ftyp"
    rb"|\0\0\0\x0cJXL |\s*<svg|\s*<\?xml|%PDF",
    re.DOTALL,
)
"""The beginnings of picture formats, and those of drawings and PDF, which messages name."""

_SPACE = re.compile(r"\s+")
_LETTERS = re.compile(r"[A-Za-z0-9+/_-]+={0,2}")
_STANDARD = bytes.maketrans(b"-_", b"+/")


@dataclass(frozen=True)
class Embedded(Picture):
    """A picture inside a row, in the field `column`, or in the list of that field at `index`.
    `again` reads the row again."""

    again: Callable[[], Mapping[str, Any]] = field(compare=False, repr=False)
    column: str
    index: int | None = None

    def read(self) -> bytes:
        """The content, from the row that is read again. Raises DataError."""
        try:
            value = self.again().get(self.column)
            if self.index is not None:
                value = value[self.index] if isinstance(value, list) else None
            stored = bytes_or_text(value)
            if not isinstance(stored, bytes | str):
                raise DataError("the row has changed")
            return content(stored)
        except (DataError, IndexError, OSError) as error:
            raise DataError(f"image cannot be read: {short(self)}: {error}") from error


def bytes_or_text(value: Any) -> Any:
    """The bytes or the text of a picture value, such as a path; of an object the bytes win over the
    URL, and the URL over the path. Any other value is returned as it is."""
    if isinstance(value, dict):
        given = (value.get(name) for name in ("bytes", "url", "path"))
        return next((entry for entry in given if entry is not None), None)
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    return str(value) if isinstance(value, Path) else value


def is_embedded(value: Any) -> bool:
    """Whether a picture value holds the picture itself, and not a path or a URL."""
    stored = bytes_or_text(value)
    if isinstance(stored, bytes):
        return True
    in_object = isinstance(value, dict) and value.get("bytes") is not None
    return isinstance(stored, str) and (in_object or _is_data_uri(stored) or _is_base64(stored))


def content(stored: bytes | str) -> bytes:
    """The encoded picture: bytes as they are, or decoded from base64 or a data URI. Raises
    DataError for any other text, and above MAX_BYTES."""
    if isinstance(stored, bytes):
        start = stored[:SNIFFED].decode("latin-1")
        if not _is_data_uri(start) and not _is_base64(start):
            return _checked(stored)
        stored = stored.decode("latin-1")
    if len(stored) > 2 * MAX_BYTES:
        raise DataError(f"{len(stored):,} characters, above {2 * MAX_BYTES:,}; save it to a file")
    if not _is_data_uri(stored):
        return _checked(_decoded(stored))
    head, comma, body = stored.partition(",")
    if not comma:
        raise DataError("a data URI without a comma, which stands before the picture")
    if head.rstrip().lower().endswith(";base64"):
        return _checked(_decoded(body))
    return _checked(unquote_to_bytes(body.encode("utf-8", "surrogatepass")))


def _is_data_uri(text: str) -> bool:
    return text[:100].lstrip()[:5].lower() == "data:"


def _is_base64(text: str) -> bool:
    """Whether a text is base64 that begins as a picture does, or long base64 of anything."""
    start = _SPACE.sub("", text[: 2 * LONG])
    if len(start) >= LONG and _LETTERS.fullmatch(start):
        return start.count("/") * 10 <= len(start) + 50
    sniffed = start[:SNIFFED].rstrip("=")
    if len(sniffed) < SHORTEST or not _LETTERS.fullmatch(sniffed):
        return False
    return _SIGNATURES.match(_decoded(sniffed[: len(sniffed) // 4 * 4])) is not None


def _decoded(text: str) -> bytes:
    """The bytes of a text in base64, of either alphabet, with or without padding and line breaks.
    Raises DataError."""
    try:
        letters = text.encode("ascii").translate(_STANDARD, b" \t\r\n\f\v").rstrip(b"=")
        return base64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except (UnicodeEncodeError, binascii.Error) as error:
        raise DataError("the text is not base64, or is cut off") from error


def _checked(picture: bytes) -> bytes:
    """Returns an encoded picture. Raises DataError if it is empty, or has more than MAX_BYTES."""
    if not picture:
        raise DataError("the picture is empty")
    if len(picture) > MAX_BYTES:
        raise DataError(f"{len(picture):,} bytes, above {MAX_BYTES:,}; save it to a file")
    return picture
