"""Builds a data set from rows: reads rows on several threads, collects the usable ones, and records
the others with their faults."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, overload

from opd.data.fields import Row
from opd.data.formats.format import Rows
from opd.data.formats.own import with_names
from opd.data.pictures import Pictures
from opd.errors import DataError
from opd.progress import Progress
from opd.types import Example, Picture

READERS = 8
"""Number of threads that decode images; Pillow releases Python's lock while it decodes."""

TOLD = 20
"""Number of faulty rows that are reported one by one."""

Fault: TypeAlias = tuple[str, str]
"""(file:line, reason) of a faulty row."""


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


def spread(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """At most `count` examples, spread evenly over a data set."""
    if isinstance(examples, Dataset):
        return examples.spread(count)
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def gather(
    file: Rows,
    read_row: Callable[[Callable[[], Row], str, tuple[Path, ...]], Example],
    pictures: Pictures,
    strict: bool,
    progress: Progress,
    count: int | None = None,
) -> Dataset:
    """Reads all rows, or, with `count`, at most so many usable rows spread over the file.

    `read_row(row, "file:line", files)` returns the example of the row that `row()` gives, which
    lies in `files`, or raises DataError for a faulty row; it reads images with `pictures`.
    With `strict` the first faulty row raises DataError; so does a file without a usable row.
    """
    read: dict[int, Example | Fault] = {}

    def take(place: int) -> Example | Fault:
        _, row = file.rows[place]
        source = file.source(place)
        try:
            return read_row(row, source, file.files(place))
        except DataError as error:
            return source, with_names(str(error), file.names)

    def take_all(places: Sequence[int]) -> list[Example | None]:
        examples = []
        for place, result in zip(places, pool.map(take, places), strict=True):
            read[place] = result
            example = result if isinstance(result, Example) else None
            examples.append(example)
            progress.advance(1 if count is None or example else 0)
            if strict and not isinstance(result, Example):
                source, reason = result
                raise DataError(
                    f"{file.path.parent / source}: {reason} (a faulty row is fatal in strict mode)"
                )
        return examples

    total = len(file.rows)
    progress.begin("read", total if count is None else min(count, total))
    pool = ThreadPoolExecutor(READERS)
    try:
        chosen = set(_spread(total, total if count is None else count, take_all))
    except BaseException:
        pictures.stop.set()  # a thread may unpack an archive for minutes
        raise
    finally:
        # Without cancel_futures, an error or Ctrl-C would wait until all images are decoded.
        pool.shutdown(cancel_futures=True)
        stored = pictures.save()
    usable: dict[int, Example] = {}
    skipped: list[Fault] = []
    for place, result in sorted(read.items()):
        if isinstance(result, Example):
            usable[place] = result
        else:
            skipped.append(result)
    if not usable and count != 0:
        first = f"; the first fault, in {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{file.path}: no usable row of {total}{first}")
    examples = [example for place, example in usable.items() if place in chosen]
    fingerprint = _fingerprint(file, examples, pictures)
    notes = [*file.notes, *_notes(pictures, stored)]
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
    untried = [place for place in range(rows) if place not in tried]
    for start in range(0, len(untried), READERS):
        if len(chosen) >= count:
            break
        places = untried[start : start + READERS]
        for place, example in zip(places, usable(places), strict=True):
            if example is not None:
                chosen.append(place)
    return sorted(chosen[:count])


def _notes(pictures: Pictures, stored: Path | None) -> list[str]:
    """Lines for a person about images of 10, 12 or 14 bits, and about the store of pictures."""
    notes = []
    depths = Counter(facts.bits for facts in pictures.facts() if facts.bits in (10, 12, 14))
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


def _fingerprint(file: Rows, examples: Sequence[Example], pictures: Pictures) -> str:
    """The SHA-256, in hexadecimal, of the file's content and of all images of the examples."""
    digest = hashlib.sha256()
    if isinstance(file.content, bytes):
        digest.update(file.content)
    else:
        for path in file.content:
            with path.open("rb") as content:
                while part := content.read(1 << 20):
                    digest.update(part)
    for example in examples:
        for image in (*example.images, *example.teacher_images):
            if isinstance(image, Path | Picture):
                digest.update(pictures(image).digest)
    return digest.hexdigest()
