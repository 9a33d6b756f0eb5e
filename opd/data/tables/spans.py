"""Reads parts of a file by their places, so that nothing of the file stays in memory but an
index."""

from __future__ import annotations

import codecs
import os
import weakref
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from opd.data.tables.table import ROW_BYTES
from opd.errors import DataError
from opd.paths import check_file

CHUNK = 1 << 22
"""Bytes that are in memory at once while a file is indexed."""


class Spans:
    """The rows of a text file by their bytes; safe for threads.

    `starts`, `ends` int64 [rows]: places of bytes, ends exclusive. `numbers` [rows]: numbers of
    their lines from 1; None: a row is a line. The file stays open, so that a file that is replaced
    under the same name is still read; a file that is changed in place is not.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, with no rows yet. Raises DataError if it cannot be opened."""
        self.path = path
        self.starts = self.ends = np.empty(0, np.int64)
        self.numbers: NDArray[np.int64] | None = None
        try:
            check_file(path)
            self._file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
        weakref.finalize(self, os.close, self._file)
        self._state = self._now()
        self.size = self._state[0]

    def __len__(self) -> int:
        return len(self.starts)

    def number(self, place: int) -> int:
        """The number of a row's line, from 1."""
        return place + 1 if self.numbers is None else int(self.numbers[place])

    def read(self, place: int) -> bytes:
        """The bytes of a row. Raises DataError if it is too long, or if the file has changed."""
        start, end = int(self.starts[place]), int(self.ends[place])
        if end - start > ROW_BYTES:
            raise DataError(
                f"the row has {end - start:,} bytes; a row may have {ROW_BYTES:,}, so save its"
                " pictures to files"
            )
        if self._now() != self._state:
            raise DataError("the file has changed since it was opened")
        return self.part(start, end - start)

    def part(self, start: int, size: int) -> bytes:
        """At most `size` bytes from the place `start`. Raises DataError."""
        try:
            return os.pread(self._file, size, start)
        except OSError as error:
            raise DataError(f"{self.path} cannot be read: {error.strerror}") from error

    def is_blank(self, start: int, end: int) -> bool:
        """Whether a part of the file holds white space alone."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return not any(
            decoder.decode(self.part(place, min(CHUNK, end - place)), place + CHUNK >= end).strip()
            for place in range(start, end, CHUNK)
        )

    def _now(self) -> tuple[int, int]:
        status = os.fstat(self._file)
        return status.st_size, status.st_mtime_ns


def lines(path: Path) -> Spans:
    """The lines of a file that are not blank. Raises DataError if it is not UTF-8."""
    spans = Spans(path)
    ends: list[NDArray[np.int64]] = []
    firsts: list[NDArray[np.uint8]] = []
    decoder = codecs.getincrementaldecoder("utf-8")()
    marked = spans.part(0, len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
    begins, place, found = True, 0, 0
    # str.splitlines is not used, since it also splits at separators that JSON allows in strings.
    while chunk := spans.part(place, CHUNK):
        _check_utf8(decoder, chunk, path, found)
        values = np.frombuffer(chunk, np.uint8)
        newlines = np.flatnonzero(values == 0x0A)
        starts = np.concatenate(([0] if begins else [], newlines + 1)).astype(np.int64)
        begins = chunk.endswith(b"\n")
        firsts.append(values[starts[: len(starts) - begins]])
        ends.append(newlines + place)
        found += len(newlines)
        place += len(chunk)
    _check_utf8(decoder, b"", path, found, final=True)
    if not begins:
        ends.append(np.array([place], np.int64))
    spans.ends = np.concatenate(ends) if ends else spans.ends
    first_start = len(codecs.BOM_UTF8) if marked else 0
    spans.starts = np.concatenate(([first_start], spans.ends[:-1] + 1))[: len(spans.ends)]
    # A line that begins with a visible character of ASCII is not blank; the others are read.
    first = np.concatenate(firsts) if firsts else np.empty(0, np.uint8)
    blank = np.zeros(len(spans), bool)
    for row in np.flatnonzero((first <= 0x20) | (first >= 0x80)):
        blank[row] = spans.is_blank(int(spans.starts[row]), int(spans.ends[row]))
    if blank.any():
        spans.numbers = np.flatnonzero(~blank) + 1
        spans.starts, spans.ends = spans.starts[~blank], spans.ends[~blank]
    return spans


def _check_utf8(
    decoder: codecs.IncrementalDecoder, chunk: bytes, path: Path, line: int, final: bool = False
) -> None:
    """Raises DataError for a chunk that is not UTF-8; `line`: number of lines before it."""
    try:
        decoder.decode(chunk, final)
    except UnicodeDecodeError as error:
        number = line + error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{number}: the file is not UTF-8 text (byte 0x{error.object[error.start]:02x});"
            " save it as UTF-8"
        ) from error
