"""Reads every row of a data file in order, without keeping what was read: for commands that look
at all rows."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL.Image import Image

from opd.data import DataOptions, open_rows
from opd.data.dataset import READERS
from opd.data.images import image_size
from opd.data.pictures import Pictures
from opd.data.remarks import Remarks
from opd.errors import DataError
from opd.progress import Progress
from opd.types import Example, ImageSource

Result = TypeVar("Result")

AHEAD = 4 * READERS
"""Number of rows that are read before the caller takes them."""


@dataclass(frozen=True)
class EveryRow:
    """The rows of a data file. `format`: the format that it is read as. `notes`: lines for a
    person; `remarks` counts more while rows are read.

    `source(place)`: file:line of the row at a place from 0. `example(place)`: the example of the
    row; raises DataError for a faulty one. Both are safe for threads.
    """

    path: Path
    format: str
    count: int
    source: Callable[[int], str]
    example: Callable[[int], Example]
    notes: Sequence[str] = ()
    pictures: Pictures | None = None
    remarks: Remarks = field(default_factory=Remarks)

    def __len__(self) -> int:
        return self.count

    def size(self, source: ImageSource) -> tuple[int, int]:
        """The upright (width, height) in pixels of a picture of an example that was read."""
        if isinstance(source, Image) or self.pictures is None:
            return image_size(source)
        return self.pictures(source).size

    def digest(self, source: ImageSource) -> bytes:
        """The SHA-256 of a picture's content, of an example that was read."""
        if isinstance(source, Image):
            return hashlib.sha256(
                repr((source.mode, source.size)).encode() + source.tobytes()
            ).digest()
        assert self.pictures is not None
        return self.pictures(source).digest

    def each(self, work: Callable[[int, Example], Result]) -> Iterator[Result | DataError]:
        """Yields `work(place, example)` of every row, in order; for a row that cannot be read, or
        for which `work` raises it, the DataError. Several threads read and work; at most AHEAD rows
        are in memory."""

        def take(place: int) -> Result | DataError:
            try:
                return work(place, self.example(place))
            except DataError as error:
                return error

        pool = ThreadPoolExecutor(READERS)
        waiting: deque[Future[Result | DataError]] = deque()
        try:
            for place in range(self.count):
                waiting.append(pool.submit(take, place))
                if len(waiting) > AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            if self.pictures is not None:
                self.pictures.stop.set()  # a thread may unpack a large archive for minutes
            raise
        finally:
            # Without cancel_futures, an error or Ctrl-C would wait until all images are decoded.
            pool.shutdown(cancel_futures=True)
            if self.pictures is not None:
                self.pictures.save()


def open_every(
    path: str, options: DataOptions, progress: Progress, evidence: bool = True
) -> EveryRow:
    """The rows of a data file, or, for "tiny", the scenes of the embedded task. With `evidence`, a
    row without boxes and teacher's images is faulty. Raises DataError if the whole file cannot be
    used."""
    if path == "tiny":
        from opd.tiny import Scenes

        scenes = Scenes("train", 12800)
        return EveryRow(
            Path(path),
            "the embedded task",
            len(scenes),
            lambda place: scenes[place].id,
            scenes.__getitem__,
        )
    reader, remarks = open_rows(
        Path(path).expanduser(), progress, options.max_image_pixels, evidence, options
    )
    file = reader.file
    return EveryRow(
        file.path,
        file.format,
        len(reader),
        reader.source,
        reader.example,
        file.notes,
        reader.pictures,
        remarks,
    )
