"""The interfaces of formats: of a row, of a whole JSON object, and of any other file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, overload, runtime_checkable

from opd.data.boxes import BoxFormat
from opd.data.fields import Row
from opd.data.tables.table import Table

Numbered = tuple[int, Callable[[], Row]]
"""The number of a row in messages, and a function that reads it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a data file in our own fields (docs/data.md), which are checked afterwards.

    `rows` holds the number of each row, by which messages name it, and a function that gives its
    fields. The function is called on several threads, and raises DataError if its row is faulty.
    `content` is what the fingerprint of the data covers beside the pictures: the bytes of the file,
    or files, in order. `box_format` is the unit of boxes in rows that state none. `notes` are lines
    for a person. `names`: what the file calls our fields, for messages; empty for our own rows.
    `folder`: paths in the rows are relative to it; None: to the folder of `path`. `format`: the
    name of the format. `images`: the archive that holds the pictures. `store`: the file beside
    which sizes of pictures are kept; None: `path`.
    """

    path: Path
    content: bytes | Sequence[Path]
    rows: Sequence[Numbered]
    box_format: BoxFormat = "pixels"
    notes: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None
    format: str = "opd's own rows"
    images: Path | None = None
    store: Path | None = None

    def source(self, place: int) -> str:
        """The name of a row in messages: "file:number"."""
        if isinstance(self.rows, OfTable):
            return self.rows.table.source(self.rows.start + place)
        return f"{self.path.name}:{self.rows[place][0]}"

    def files(self, place: int) -> tuple[Path, ...]:
        """The files that hold a row."""
        if isinstance(self.rows, OfTable):
            return self.rows.table.files(self.rows.start + place)
        return (self.path,) if isinstance(self.content, bytes) else tuple(self.content)


class Format(Protocol):
    """Reads the rows of a table in one format. One object reads many tables, so it must not keep
    state."""

    @property
    def name(self) -> str:
        """The format's name in messages, such as "Vision-OPD-6K, clean"."""
        ...

    @property
    def key(self) -> str:
        """The format's name in `data.format`, such as "vision-opd"."""
        ...

    @property
    def marks(self) -> Sequence[str]:
        """The fields by which the format is recognised; of two formats that match a row, the one
        whose marks hold all marks of the other is taken."""
        ...

    @property
    def box_format(self) -> BoxFormat:
        """The unit of boxes in rows that state none."""
        ...

    @property
    def names(self) -> Mapping[str, str]:
        """What the format calls our fields, for messages."""
        ...

    def matches(self, row: Row) -> bool:
        """Whether a row seems to have this format."""
        ...

    def own(self, row: Row) -> Row:
        """The row with our fields. Raises DataError for a faulty row."""
        ...


@runtime_checkable
class WholeFormat(Protocol):
    """Reads the rows of a file that is one JSON object, such as the annotations of COCO."""

    @property
    def name(self) -> str:
        """The format's name in messages."""
        ...

    @property
    def key(self) -> str:
        """The format's name in `data.format`."""
        ...

    @property
    def box_format(self) -> BoxFormat:
        """The unit of boxes in rows that state none."""
        ...

    @property
    def names(self) -> Mapping[str, str]:
        """What the format calls our fields, for messages."""
        ...

    def matches(self, row: Row) -> bool:
        """Whether an object seems to have this format."""
        ...

    def to_rows(self, whole: Row) -> list[Row]:
        """The rows of the object, with our fields. Raises DataError if it holds none."""
        ...


@runtime_checkable
class FileFormat(Protocol):
    """Reads files that are not tables, or that are read in another way."""

    @property
    def name(self) -> str:
        """The format's name in messages."""
        ...

    def recognise(self, path: Path, start: bytes) -> bool:
        """Whether a file or folder has this format. `start`: the first bytes of the file, at most
        65,536; empty for a folder."""
        ...

    def read(self, path: Path) -> Rows:
        """The rows of a file or folder. Raises DataError if the whole file cannot be used."""
        ...


class OfTable(Sequence[Numbered]):
    """The rows of a table, from place `start` on, for `Rows.rows`; `to_own` gives them our
    fields."""

    def __init__(self, table: Table, to_own: Callable[[Row], Row], start: int = 0) -> None:
        self.table, self.to_own, self.start = table, to_own, start

    def __len__(self) -> int:
        return len(self.table) - self.start

    @overload
    def __getitem__(self, index: int) -> Numbered: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Numbered]: ...

    def __getitem__(self, index: int | slice) -> Numbered | Sequence[Numbered]:
        """The row at `index`, or a list of rows."""
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = self.start + range(len(self))[index]
        return self.table.number(place), OwnRow(self, place)


@dataclass(frozen=True)
class OwnRow:
    """A row of a table, which is read again by each call. Small and hashable, so that a picture
    that lies in a row can hold it."""

    rows: OfTable
    place: int

    def __call__(self) -> Row:
        """The row with our fields. Raises DataError."""
        return self.rows.to_own(self.rows.table.row(self.place))
