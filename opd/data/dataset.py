"""From rows to a data set: reads many rows at once, keeps the usable ones, and counts the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from opd.data.jsonl import Lines, parse
from opd.errors import DataError
from opd.images import open_image
from opd.progress import Progress
from opd.types import MAX_IMAGE_PIXELS, Example

READERS = 8
"""Threads that decode images while a file is read; Pillow decodes outside Python's lock."""


class Dataset(Sequence[Example]):
    """The usable rows of a data file, in its order.

    `skipped` holds (file:line, reason) of every other row. `fingerprint` is the sha256 of the content, of the file and of every image
    of a usable row, so it does not depend on where the files are.
    """

    def __init__(self, examples: Sequence[Example], skipped: Sequence[tuple[str, str]], fingerprint: str) -> None:
        self._examples = tuple(examples)
        self.skipped = list(skipped)
        self.fingerprint = fingerprint

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """The example at `index`, or a tuple of examples."""
        return self._examples[index]


@dataclass(frozen=True)
class ImageFacts:
    """What reading an image file told: its upright (width, height) in pixels, the sha256 of the file, or the `fault`."""

    size: tuple[int, int]
    digest: bytes
    fault: str = ""


def read_image(path: Path, max_pixels: int = MAX_IMAGE_PIXELS) -> ImageFacts:
    """Decodes an image file fully and forgets its pixels. Never raises, so that the result can be kept for rows that share it."""
    try:
        size = open_image(path, max_pixels).size
        with path.open("rb") as file:
            return ImageFacts(size, hashlib.file_digest(file, "sha256").digest())
    except (DataError, OSError) as error:
        return ImageFacts((0, 0), b"", str(error))


def gather(
    lines: Lines,
    read_row: Callable[[dict[str, Any], str], Example],
    facts: Callable[[Path], ImageFacts],
    strict: bool,
    progress: Progress,
) -> Dataset:
    """Reads every row with `read_row(row, "file:line")`, which raises DataError for a fault. `facts` is what it read images with."""
    examples: list[Example] = []
    skipped: list[tuple[str, str]] = []

    def read(numbered: tuple[int, str]) -> Example | tuple[str, str]:
        number, line = numbered
        source = f"{lines.path.name}:{number}"
        try:
            return read_row(parse(line), source)
        except DataError as error:
            return source, str(error)

    progress.begin("read", len(lines.rows))
    pool = ThreadPoolExecutor(READERS)
    try:
        for found in pool.map(read, lines.rows):
            progress.advance(1)
            if isinstance(found, Example):
                examples.append(found)
                continue
            skipped.append(found)
            if strict:
                raise DataError(f"{lines.path.parent / found[0]}: {found[1]} (a faulty row is fatal in strict mode)")
    finally:
        # An interrupted or failed reading must not decode the rest of the images first.
        pool.shutdown(cancel_futures=True)
    if not examples:
        first = f"; the first fault, in {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
        raise DataError(f"{lines.path}: no usable row of {len(lines.rows)}{first}")
    digest = hashlib.sha256(lines.content)
    for example in examples:
        for image in (*example.images, *example.teacher_images):
            if isinstance(image, Path):
                digest.update(facts(image).digest)
    return Dataset(examples, skipped, digest.hexdigest())
