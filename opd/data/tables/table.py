"""The interface of tables: a data file as numbered rows, each read when it is needed.

A table knows files and not formats: a row is what the file holds, as plain Python values (objects,
lists, texts, numbers, bools, None, and bytes in Parquet). `opd.data.formats` gives it our fields.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from opd.data.fields import Row
from opd.data.jsonl import as_row

ROW_BYTES = 64 * 2**20
"""Largest number of bytes of a row in a text file: pictures of 48 MB in base64. A larger row is
faulty and never read, so that a file of one line cannot fill the memory."""

CHECKED = 2048
"""Largest number of rows that are checked when a file is opened: all of a smaller file, and of a
larger one so many, spread evenly. The others are checked when they are needed."""


class Table(ABC):
    """The rows of a data file, by their place from 0.

    `path`: the file or folder, for messages. `kind`: in words, such as "JSON lines". `folder`:
    paths of pictures in the rows are relative to it. `content` is what the fingerprint of the data
    covers: bytes, or files, in order. `columns`: the names in the header, if the file has one for
    all rows. `notes` are lines for a person. `images`: the archive that holds the pictures.
    `store`: the file beside which sizes of pictures are kept; None: `path`.
    """

    path: Path
    kind: str
    content: bytes | Sequence[Path]
    columns: Sequence[str] | None = None
    notes: Sequence[str] = ()
    images: Path | None = None
    store: Path | None = None

    @property
    def folder(self) -> Path:
        """The folder of relative paths in the rows."""
        return self.path.parent

    @abstractmethod
    def __len__(self) -> int:
        """Number of rows, including faulty ones."""

    @abstractmethod
    def number(self, place: int) -> int:
        """The number of a row in messages: of its line in a text file, else of the row, from 1."""

    @abstractmethod
    def row(self, place: int) -> Row:
        """Reads a row, which the table does not keep. Safe for threads. Raises DataError for a
        faulty row."""

    def source(self, place: int) -> str:
        """The name of a row in messages: "file:number"."""
        return f"{self.path.name}:{self.number(place)}"

    def files(self, place: int) -> tuple[Path, ...]:
        """The files that hold a row."""
        return (self.path,) if isinstance(self.content, bytes) else tuple(self.content)


def spread_places(rows: int, count: int) -> list[int]:
    """At most `count` places among `rows`, spread evenly."""
    count = min(count, rows)
    return [place * rows // count for place in range(count)]


class Entries(Table):
    """A table whose rows are in memory: those of a JSON file that is read whole."""

    def __init__(self, path: Path, kind: str, entries: Sequence[Row]) -> None:
        self.path, self.kind, self.content, self.entries = path, kind, [path], entries

    def inside(self, table: Table) -> Entries:
        """These rows as those of `table`, which holds them."""
        self.path, self.content, self.notes = table.path, table.content, table.notes
        self.images, self.store = table.images, table.store
        return self

    def __len__(self) -> int:
        return len(self.entries)

    def number(self, place: int) -> int:
        """The number of the entry, from 1."""
        return place + 1

    def row(self, place: int) -> Row:
        """The entry, which must be an object."""
        return as_row(self.entries[place])
