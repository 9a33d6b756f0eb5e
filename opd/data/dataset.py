"""From rows to a data set: reads many rows at once, keeps the usable ones, and counts the
others."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias, overload

from opd.data.fields import Row
from opd.data.formats.format import Rows
from opd.data.pictures import Pictures
from opd.errors import DataError
from opd.progress import Progress
from opd.types import Example

READERS = 8
"""Threads that decode images while a file is read; Pillow decodes outside Python's lock."""

TOLD = 20
"""Faulty rows that are told one by one."""

Fault: TypeAlias = tuple[str, str]


class Dataset(Sequence[Example]):
    """The usable rows of a data file, in its order, or a few of them.

    `skipped` holds (file:line, reason) of every other row that was read. `fingerprint` is the
    sha256 of the content, of the file and of every image of a usable row, so it does not depend on
    where the files are. `notes` are lines that a person should read.
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
        """`places`: the number of each example's row among all `rows` of the file, faulty ones
        too."""
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
        """Rows of the whole file, faulty ones too."""
        return self._rows

    def without_answers(self) -> Dataset:
        """The same rows for training alone."""
        examples = [replace(example, answer=None) for example in self._examples]
        return Dataset(
            examples, self.skipped, self.fingerprint, self.notes, self._places, self._rows
        )

    def spread(self, count: int) -> list[Example]:
        """At most `count` examples spread evenly over the file: the very ones that reading so few
        rows of it gives."""
        usable = dict(zip(self._places, self._examples, strict=True))
        chosen = _spread(self._rows, count, lambda places: [usable.get(place) for place in places])
        return [usable[place] for place in chosen]

    def tell(self, progress: Progress) -> None:
        """Tells the notes, and the rows that were skipped."""
        for note in self.notes:
            progress.note(note)
        for source, reason in self.skipped[:TOLD]:
            progress.note(f"skipped {source}: {reason}")
        if len(self.skipped) > TOLD:
            progress.note(
                f"skipped {len(self.skipped) - TOLD} more rows, {len(self.skipped)} in all"
            )


def spread(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """At most `count` examples spread evenly over a data set."""
    if isinstance(examples, Dataset):
        return examples.spread(count)
    count = min(count, len(examples))
    return [examples[index * len(examples) // count] for index in range(count)]


def gather(
    file: Rows,
    read_row: Callable[[Row, str], Example],
    pictures: Pictures,
    strict: bool,
    progress: Progress,
    count: int | None = None,
) -> Dataset:
    """Reads every row with `read_row(row, "file:line")`, which raises DataError for a fault; with
    `count`, so many spread over the file.

    `pictures` is what `read_row` reads images with.
    """
    read: dict[int, Example | Fault] = {}

    def take(place: int) -> Example | Fault:
        number, row = file.rows[place]
        source = f"{file.path.name}:{number}"
        try:
            return read_row(row(), source)
        except DataError as error:
            return source, str(error)

    def take_all(places: Sequence[int]) -> list[Example | None]:
        for place, found in zip(places, pool.map(take, places), strict=True):
            progress.advance(1 if count is None or isinstance(found, Example) else 0)
            read[place] = found
            if strict and not isinstance(found, Example):
                raise DataError(
                    f"{file.path.parent / found[0]}: {found[1]} (a faulty row is fatal in strict"
                    " mode)"
                )
        return [found if isinstance(found := read[place], Example) else None for place in places]

    total = len(file.rows)
    progress.begin("read", total if count is None else min(count, total))
    pool = ThreadPoolExecutor(READERS)
    try:
        chosen = set(_spread(total, total if count is None else count, take_all))
    finally:
        # An interrupted or failed reading must not decode the rest of the images first.
        pool.shutdown(cancel_futures=True)
        stored = pictures.save()
    usable = {place: found for place, found in sorted(read.items()) if isinstance(found, Example)}
    skipped = [found for _, found in sorted(read.items()) if not isinstance(found, Example)]
    if not usable and count != 0:
        first = f"; the first fault, in {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{file.path}: no usable row of {total}{first}")
    examples = [example for place, example in usable.items() if place in chosen]
    told = [*file.notes, *_told(pictures, stored)]
    return Dataset(
        examples, skipped, _fingerprint(file, examples, pictures), told, sorted(chosen), total
    )


def _spread(
    rows: int, count: int, usable: Callable[[Sequence[int]], Sequence[Example | None]]
) -> list[int]:
    """Numbers of `count` usable rows of `rows`, spread evenly, in order; fewer where there are no
    more.

    Each of `count` equal stretches of the file gives its first usable row; a stretch without any is
    made up for by the first rows of the others. `usable` reads rows: None for a faulty one.
    """
    count = min(count, rows)
    if count < 1:
        return []
    starts = [index * rows // count for index in range(count)]
    stretches = [
        iter(range(start, end)) for start, end in zip(starts, [*starts[1:], rows], strict=True)
    ]
    chosen: list[int] = []
    tried: set[int] = set()
    while stretches:
        heads = [
            (stretch, place) for stretch in stretches if (place := next(stretch, None)) is not None
        ]
        found = usable([place for _, place in heads])
        tried.update(place for _, place in heads)
        chosen += [place for (_, place), one in zip(heads, found, strict=True) if one is not None]
        stretches = [stretch for (stretch, _), one in zip(heads, found, strict=True) if one is None]
    left = iter([place for place in range(rows) if place not in tried])
    for places in _chunks(left, READERS):
        if len(chosen) >= count:
            break
        found = usable(places)
        chosen += [place for place, one in zip(places, found, strict=True) if one is not None]
    return sorted(chosen[:count])


def _chunks(numbers: Iterator[int], size: int) -> Iterator[list[int]]:
    while chunk := [number for _, number in zip(range(size), numbers, strict=False)]:
        yield chunk


def _told(pictures: Pictures, stored: Path | None) -> list[str]:
    notes = []
    for bits, count in sorted(
        Counter(one.bits for one in pictures.facts() if one.bits in (10, 12, 14)).items()
    ):
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
    digest = hashlib.sha256(file.content)
    for example in examples:
        for image in (*example.images, *example.teacher_images):
            if isinstance(image, Path):
                digest.update(pictures(image).digest)
    return digest.hexdigest()
