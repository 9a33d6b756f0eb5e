"""The interface of formats: recognise a file, and read it into rows with our fields."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from opd.data.boxes import BoxFormat
from opd.data.fields import Row


@dataclass(frozen=True)
class Rows:
    """The rows of a data file in our own fields (docs/data.md), which are checked afterwards.

    `rows` holds the number of each row, by which messages name it, and a function that gives its
    fields. The function is called on several threads, and raises DataError if its row is faulty.
    `content` is what the fingerprint of the data covers beside the pictures: the bytes of the file.
    `box_format` is the unit of boxes in rows that state none. `notes` are lines for a person.
    `names`: what the file calls our fields, for messages; empty for our own rows.
    """

    path: Path
    content: bytes
    rows: Sequence[tuple[int, Callable[[], Row]]]
    box_format: BoxFormat = "pixels"
    notes: Sequence[str] = ()
    names: Mapping[str, str] = field(default_factory=dict)


class Format(Protocol):
    """Reads files of one format. One object reads many files, so it must not keep state."""

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
