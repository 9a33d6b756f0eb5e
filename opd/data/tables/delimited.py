"""CSV and TSV: a header, and a row for each record. Only the places of the records are in memory.

Cells are texts; an empty cell is absent. A record may hold line breaks between quotation marks.
"""

from __future__ import annotations

import csv
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from opd.data.fields import Row, cut
from opd.data.tables.spans import Spans
from opd.data.tables.table import ROW_BYTES, Table
from opd.errors import DataError, plural

SEPARATORS = ",\t;|"

csv.field_size_limit(ROW_BYTES)  # a picture in base64 is longer than the module's own limit


class Delimited(Table):
    """The records of a CSV or TSV file."""

    def __init__(self, spans: Spans, separator: str, columns: Sequence[str]) -> None:
        self.path = spans.path
        self.content = [spans.path]
        self.columns = [name for name in columns if name]
        self.kind = "TSV" if separator == "\t" else "CSV"
        self._spans, self._separator, self._names = spans, separator, columns

    def __len__(self) -> int:
        return len(self._spans)

    def number(self, place: int) -> int:
        """The number of the line in which the record begins, from 1."""
        return self._spans.number(place)

    def row(self, place: int) -> Row:
        """The cells of a record by their columns; empty cells are None. Raises DataError for a
        record with more or fewer cells than columns."""
        text = self._spans.read(place).decode("utf-8")
        cells = cells_of(text, self._separator, len(self._names))
        if len(cells) != len(self._names):
            raise DataError(
                f"{plural(len(cells), 'cell')} for {plural(len(self._names), 'column')}; a cell"
                " with a separator or a line break stands in quotation marks"
            )
        named = zip(self._names, cells, strict=True)
        return {name: cell or None for name, cell in named if name}


def open_delimited(path: Path) -> Table:
    """The rows of a CSV or TSV file. Raises DataError."""
    records = _Records(path)
    header = records.header()
    try:
        separator = separator_of(header, path)
        columns = [cell.strip() for cell in cells_of(header, separator)]
    except DataError as error:
        raise DataError(f"{path}: the header is {error}") from error
    for name, count in Counter(columns).items():
        if name and count > 1:
            raise DataError(f"{path}: column '{cut(name)}' stands {count} times in the header")
    spans = records.index(separator, len(columns))
    if not len(spans):
        raise DataError(f"{path}: the file has a header and no rows")
    return Delimited(spans, separator, columns)


def separator_of(header: str, path: Path | None = None) -> str:
    """The separator that gives the header most cells; of a .tsv file the tab if it has any."""
    if path and path.suffix.lower() == ".tsv" and "\t" in header:
        return "\t"
    return max(SEPARATORS, key=lambda separator: len(cells_of(header, separator)))


def is_header(line: str) -> bool:
    """Whether a line looks like the header of a table: several different short words."""
    cells = [cell.strip() for cell in cells_of(line, separator_of(line))]
    return 1 < len(cells) == len(set(cells)) and all(
        len(cell) <= 40 and cell.replace("_", "").replace("-", "").replace(" ", "").isalnum()
        for cell in cells
    )


def cells_of(text: str, separator: str, wanted: int | None = None) -> list[str]:
    """The cells of a record. If they are not the `wanted` number, quotation marks are taken as they
    are if that gives it: programs that write TSV often do not double them. Raises DataError."""
    try:
        cells = next(csv.reader([text], delimiter=separator), [])
        if wanted is None or len(cells) == wanted:
            return cells
        if not any(cells[wanted:]) and len(cells) > wanted:  # separators at the end
            return cells[:wanted]
        plain = next(csv.reader([text], delimiter=separator, quoting=csv.QUOTE_NONE), [])
        return plain if len(plain) == wanted else cells
    except csv.Error as error:
        raise DataError(f"not a record of cells: {error}") from error


class _Records:
    """Finds the records of a file, reading it once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._spans = Spans(path)
        self._place = 0
        self._line = 0
        self._budget = ROW_BYTES
        """Bytes of records with unbalanced quotation marks that may be read twice."""

    def header(self) -> str:
        """The first line that is not blank. Raises DataError."""
        with self.path.open("rb") as file:
            for line in self._lines(file):
                text = line.removeprefix("\ufeff").strip("\r\n")
                if text.strip():
                    return text
        raise DataError(f"{self.path}: the file is empty")

    def index(self, separator: str, columns: int) -> Spans:
        """The places of all records after the header."""
        starts, ends, numbers = array("q"), array("q"), array("q")
        with self.path.open("rb") as file:
            file.seek(self._place)
            lines = self._lines(file)
            while True:
                start, number = self._place, self._line + 1
                line = next(lines, None)
                if line is None:
                    break
                if '"' in line:
                    self._record(file, line, separator, columns, start, number)
                if line.strip():
                    starts.append(start)
                    ends.append(self._place)
                    numbers.append(number)
        spans = self._spans
        spans.starts, spans.ends = np.array(starts, np.int64), np.array(ends, np.int64)
        spans.numbers = np.array(numbers, np.int64)
        return spans

    def _record(
        self, file: IO[bytes], line: str, separator: str, columns: int, start: int, number: int
    ) -> None:
        """Reads the further lines of a record that begins with `line`; none if they do not give it
        the number of `columns`."""
        place, count = self._place, self._line
        if self._budget > 0:
            first_and_more = self._bounded(line, self._lines(file), start)
            try:
                cells = next(csv.reader(first_and_more, delimiter=separator, strict=True), [])
                if len(cells) == columns or self._line == count:
                    return
            except (csv.Error, _TooLong):
                pass
        self._budget -= self._place - place
        self._place, self._line = place, count
        file.seek(place)

    def _bounded(self, first: str, others: Iterator[str], start: int) -> Iterator[str]:
        """The lines of a record that begins at `start`. Raises _TooLong for too long a record."""
        yield first
        for line in others:
            if self._place - start > ROW_BYTES:
                raise _TooLong
            yield line

    def _lines(self, file: IO[bytes]) -> Iterator[str]:
        """The lines from the place in the file on. Raises DataError for text that is not UTF-8, and
        for a line without an end."""
        while line := file.readline(ROW_BYTES + 1):
            if len(line) > ROW_BYTES:
                raise DataError(
                    f"{self.path}:{self._line + 1}: the line has more than {ROW_BYTES:,} bytes"
                )
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{self.path}:{self._line + 1}: the file is not UTF-8 text (byte"
                    f" 0x{line[error.start]:02x}); save it as UTF-8"
                ) from error
            self._place += len(line)
            self._line += 1
            yield text


class _TooLong(Exception):
    """A record is longer than a row may be."""
