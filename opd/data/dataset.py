"""Builds a data set from rows: reads rows on several threads, collects the usable ones, and records
the others with their faults."""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TypeAlias, overload

from opd.data.fields import Row
from opd.data.formats.format import Rows
from opd.data.formats.own import with_names
from opd.data.pictures import Pictures
from opd.data.tables.table import CHECKED, spread_places
from opd.errors import DataError, plural
from opd.progress import Progress
from opd.types import Example, Picture

READERS = 8
"""Number of threads that decode images; Pillow releases Python's lock while it decodes."""

TOLD = 20
"""Number of faulty rows that are reported one by one."""

Fault: TypeAlias = tuple[str, str]
"""(file:line, reason) of a faulty row."""

ReadRow: TypeAlias = Callable[[Callable[[], Row], str, tuple[Path, ...]], Example]


class Dataset(Sequence[Example]):
    """The usable rows of a data file, in the order of the file; all, or some spread over the file.

    `skipped` lists the faults of all other rows that were read. `fingerprint` is the SHA-256 of the
    content of the file and of the images of the examples, so it does not depend on where the files
    are. `notes` are lines for a person.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        skipped: Sequence[Fault],
        fingerprint: str,
        notes: Sequence[str] = (),
        places: Sequence[int] = (),
        rows: int = 0,
    ) -> None:
        """`places`: the index of each example's row among all `rows` of the file, including faulty
        rows."""
        self._examples = tuple(examples)
        self.skipped = list(skipped)
        self.fingerprint = fingerprint
        self.notes = list(notes)
        self._places = tuple(places) or tuple(range(len(self._examples)))
        self._rows = rows or len(self._examples)

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """The example at `index`, or a tuple of examples."""
        return self._examples[index]

    @property
    def checked(self) -> Sequence[Example]:
        """The examples that were read beforehand: all."""
        return self._examples

    @property
    def rows(self) -> int:
        """Number of rows in the whole file, including faulty rows."""
        return self._rows

    def without_answers(self) -> Dataset:
        """The same data set without reference answers."""
        examples = [replace(example, answer=None) for example in self._examples]
        return Dataset(
            examples, self.skipped, self.fingerprint, self.notes, self._places, self._rows
        )

    def spread(self, count: int) -> list[Example]:
        """At most `count` examples, spread evenly over the file: the same ones that `gather`
        returns with this `count`."""
        usable = dict(zip(self._places, self._examples, strict=True))
        chosen = _spread(self._rows, count, lambda places: [usable.get(place) for place in places])
        return [usable[place] for place in chosen]

    def tell(self, progress: Progress) -> None:
        """Reports the notes, and up to TOLD skipped rows."""
        for note in self.notes:
            progress.note(note)
        for source, reason in self.skipped[:TOLD]:
            progress.note(f"skipped {source}: {reason}")
        if len(self.skipped) > TOLD:
            progress.note(
                f"skipped {len(self.skipped) - TOLD} more rows, {len(self.skipped)} in all"
            )


class LargeDataset(Dataset):
    """The rows of a large file, each read when it is needed.

    An index names a row that is not known to be faulty; reading one that is raises FaultyRow, or
    DataError if the data set is strict. Iterating leaves faulty rows out. `skipped` and
    `fingerprint` are those of the rows that are checked beforehand.
    """

    def __init__(
        self,
        reader: Reader,
        checked: Mapping[int, Example],
        faults: Mapping[int, Fault],
        fingerprint: str,
        notes: Sequence[str],
        strict: bool,
        labelled: bool = True,
    ) -> None:
        """`checked`: examples by their places, `faults` those of rows that cannot be used."""
        super().__init__(
            tuple(checked.values()), list(faults.values()), fingerprint, notes, rows=len(reader)
        )
        self._reader, self._checked, self._faults = reader, checked, faults
        self._strict, self._labelled = strict, labelled
        # The number of usable rows before each faulty one.
        self._before = [place - number for number, place in enumerate(sorted(faults))]

    def __len__(self) -> int:
        return len(self._reader) - len(self._faults)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """The example at `index`, or a tuple of examples. Raises FaultyRow."""
        if isinstance(index, slice):
            return tuple(self[place] for place in range(*index.indices(len(self))))
        usable = range(len(self))[index]
        return self._example(usable + bisect_right(self._before, usable))

    def __iter__(self) -> Iterator[Example]:
        """All usable examples, in order."""
        for index in range(len(self)):
            with suppress(FaultyRow):
                yield self[index]

    @property
    def checked(self) -> Sequence[Example]:
        """The examples that are checked beforehand, spread over the file."""
        return self._examples

    def without_answers(self) -> Dataset:
        """The same data set without reference answers."""
        return LargeDataset(
            self._reader,
            {place: replace(example, answer=None) for place, example in self._checked.items()},
            self._faults,
            self.fingerprint,
            self.notes,
            self._strict,
            labelled=False,
        )

    def spread(self, count: int) -> list[Example]:
        """At most `count` usable examples, spread evenly over the file: those that `gather` returns
        with this `count`."""
        read: dict[int, Example] = {}

        def take(place: int) -> Example | None:
            if place in self._faults:
                return None
            try:
                return self._example(place)
            except FaultyRow:
                return None

        def take_all(places: Sequence[int]) -> list[Example | None]:
            examples = list(pool.map(take, places))
            read.update(
                (place, example) for place, example in zip(places, examples, strict=True) if example
            )
            return examples

        pool = ThreadPoolExecutor(READERS)
        try:
            return [read[place] for place in _spread(len(self._reader), count, take_all)]
        finally:
            pool.shutdown(cancel_futures=True)

    def _example(self, place: int) -> Example:
        """The example of the row at a place of the file. Raises FaultyRow."""
        example = self._checked.get(place)
        if example is not None:
            return example
        try:
            example = self._reader.example(place, later=True)
        except FaultyRow as error:
            if self._strict:
                raise self._reader.strict(error) from error
            raise
        return example if self._labelled else replace(example, answer=None)


def spread(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """At most `count` examples, spread evenly over a data set."""
    if isinstance(examples, Dataset):
        return examples.spread(count)
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


@dataclass(frozen=True)
class Reader:
    """Reads the rows of a data file, by their places from 0; safe for threads.

    `read_row(row, "file:line", files)` returns the example of the row that `row()` gives, which
    lies in `files`, or raises DataError for a faulty row; it decodes images, with `pictures`.
    `read_later` does the same without decoding images.
    """

    file: Rows
    read_row: ReadRow
    read_later: ReadRow
    pictures: Pictures

    def __len__(self) -> int:
        return len(self.file.rows)

    def source(self, place: int) -> str:
        """The name of a row: "file:line"."""
        return self.file.source(place)

    def example(self, place: int, later: bool = False) -> Example:
        """The example of a row; `later`: without decoding images. Raises FaultyRow."""
        _, row = self.file.rows[place]
        source = self.file.source(place)
        read = self.read_later if later else self.read_row
        try:
            return read(row, source, self.file.files(place))
        except DataError as error:
            raise FaultyRow(source, with_names(str(error), self.file.names)) from error

    def strict(self, error: FaultyRow) -> DataError:
        """The DataError for a faulty row where none may be."""
        return DataError(
            f"{self.file.path.parent / error.source}: {error} (a faulty row is fatal in strict"
            " mode)"
        )


class FaultyRow(DataError):
    """A row that cannot be used. `source`: "file:line"."""

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(reason)
        self.source = source


def gather(reader: Reader, strict: bool, progress: Progress, count: int | None = None) -> Dataset:
    """Reads all rows, or, with `count`, at most so many usable rows spread over the file. Of a file
    with more than CHECKED rows it reads so many, spread evenly; the others are read when they are
    needed.

    With `strict` the first faulty row raises DataError; so does a file without a usable row.
    """
    file, total = reader.file, len(reader)
    read: dict[int, Example | Fault] = {}

    def take(place: int) -> Example | FaultyRow:
        try:
            return reader.example(place)
        except FaultyRow as error:
            return error

    def take_all(places: Sequence[int]) -> list[Example | None]:
        examples = []
        for place, result in zip(places, pool.map(take, places), strict=True):
            example = result if isinstance(result, Example) else None
            if isinstance(result, FaultyRow):
                read[place] = result.source, str(result)
                if strict:
                    raise reader.strict(result)
            else:
                read[place] = result
            examples.append(example)
            progress.advance(1 if count is None or example else 0)
        return examples

    wanted = min(CHECKED, total) if count is None else min(count, total)
    progress.begin("read", wanted)
    pool = ThreadPoolExecutor(READERS)
    try:
        content = pool.submit(_content, file, reader.pictures.stop)
        if count is None:
            places = spread_places(total, CHECKED)
            chosen = {place for place, row in zip(places, take_all(places), strict=True) if row}
        else:
            chosen = set(_spread(total, count, take_all))
        digest = content.result()
    except BaseException:
        reader.pictures.stop.set()  # a thread may unpack or hash a large file for minutes
        raise
    finally:
        # Without cancel_futures, an error or Ctrl-C would wait until all images are decoded.
        pool.shutdown(cancel_futures=True)
        stored = reader.pictures.save()
    usable: dict[int, Example] = {}
    faults: dict[int, Fault] = {}
    for place, result in sorted(read.items()):
        if isinstance(result, Example):
            usable[place] = result
        else:
            faults[place] = result
    skipped = list(faults.values())
    if not usable and count != 0:
        first = f"; the first fault, in {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        some = f"{total}" if len(read) == total else f"{len(read):,} read of {total:,}"
        raise DataError(f"{file.path}: no usable row of {some}{first}")
    examples = [example for place, example in usable.items() if place in chosen]
    fingerprint = _fingerprint(digest, examples, reader.pictures)
    notes = [*file.notes, *_notes(reader.pictures, stored)]
    if count is None and total > CHECKED:
        notes.append(
            f"{len(read):,} of {plural(total, 'row')} are checked, the others when they are"
            f" reached; all are checked by: opd data check {file.path}"
        )
        return LargeDataset(reader, usable, faults, fingerprint, notes, strict)
    return Dataset(examples, skipped, fingerprint, notes, sorted(chosen), total)


def _spread(
    rows: int, count: int, usable: Callable[[Sequence[int]], Sequence[Example | None]]
) -> list[int]:
    """Indices in ascending order of `count` usable rows among `rows`, spread evenly; fewer if there
    are fewer.

    The file is divided into `count` equal sections, and the first usable row of each is chosen. For
    a section without a usable row, the first untried row of the file that is usable is chosen.
    `usable` reads rows, and returns None for a faulty one.
    """
    count = min(count, rows)
    if count < 1:
        return []
    starts = [index * rows // count for index in range(count)]
    ends = [*starts[1:], rows]
    chosen: list[int] = []
    tried: set[int] = set()
    # One row of every section at a time, so that `usable` can read them on several threads.
    sections = list(zip(starts, ends, strict=True))
    while sections:
        places = [place for place, _ in sections]
        tried.update(places)
        remaining = []
        for (place, end), example in zip(sections, usable(places), strict=True):
            if example is not None:
                chosen.append(place)
            elif place + 1 < end:
                remaining.append((place + 1, end))
        sections = remaining
    untried = (place for place in range(rows) if place not in tried)
    while len(chosen) < count and (places := list(islice(untried, READERS))):
        for place, example in zip(places, usable(places), strict=True):
            if example is not None:
                chosen.append(place)
    return sorted(chosen[:count])


def _notes(pictures: Pictures, stored: Path | None) -> list[str]:
    """Lines for a person about images of 10, 12 or 14 bits, and about the store of pictures."""
    notes = []
    depths = {bits: count for bits, count in pictures.depths().items() if bits in (10, 12, 14)}
    for bits, count in sorted(depths.items()):
        word = "pictures hold" if count > 1 else "picture holds"
        notes.append(
            f"{count} {word} {bits} bits in 16 (no value above {(1 << bits) - 1}): stretched, as"
            " they would be dark"
        )
    if stored:
        notes.append(
            f"sizes and hashes of the pictures are kept in {stored}: the next reading decodes only"
            " what has changed"
        )
    return notes


def _content(file: Rows, stop: threading.Event) -> hashlib._Hash:
    """The running SHA-256 of the content of a file; `stop` ends reading. Raises DataError."""
    digest = hashlib.sha256()
    if isinstance(file.content, bytes):
        digest.update(file.content)
        return digest
    for path in file.content:
        try:
            with path.open("rb") as content:
                while not stop.is_set() and (part := content.read(1 << 20)):
                    digest.update(part)
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}") from error
    return digest


def _fingerprint(digest: hashlib._Hash, examples: Sequence[Example], pictures: Pictures) -> str:
    """The SHA-256, in hexadecimal, of the file's content, of which `digest` is, and of all images
    of the examples."""
    for example in examples:
        for image in (*example.images, *example.teacher_images):
            if isinstance(image, Path | Picture):
                digest.update(pictures(image).digest)
    return digest.hexdigest()
