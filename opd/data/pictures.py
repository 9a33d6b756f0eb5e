"""Reads sizes and hashes of pictures. Every picture is decoded once; a store beside the data file
records the results for the next run (`opd.data.picture_store`).

An entry of the store is valid only while the files that hold the picture have the same size, inode,
modification time and change time.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from opd.data.images import check_size, measured, opened, orientation, short
from opd.data.picture_store import ImageFacts, PictureStore
from opd.errors import DataError
from opd.types import EncodedImage, Picture

KEPT = 8192
"""Number of images whose facts stay in memory, those that were asked for last."""

POOL_PIXELS = 1 << 27
"""Largest number of pixels that all threads decode at once: 134 million, half a gigabyte. An image
with more is decoded alone."""

STORE_PICTURES, STORE_PIXELS = 32, 1 << 25
"""The store is written if at least this many images, or pixels, were decoded; fewer are decoded in
no time."""

SETTLED = 0.2
"""If a file was last modified this many seconds ago, any later change shows in its times; 2 seconds
for file systems with times in whole seconds, such as FAT."""


class Pictures:
    """Reads images for the rows of a data file; safe for threads, in bounded memory. `store`: the
    data file whose store is used; None: no store. `stop` is set once reading has failed, so that
    whatever takes long ends."""

    def __init__(self, max_pixels: int, store: Path | None = None) -> None:
        self._max_pixels = max_pixels
        self._folder = store.parent if store else Path()
        self._store = PictureStore(store) if store else None
        self._facts: OrderedDict[EncodedImage, Future[ImageFacts]] = OrderedDict()
        self._lock = threading.Lock()
        self._budget = PixelBudget(POOL_PIXELS)
        self._decoded = self._pixels = 0
        self._depths: Counter[int] = Counter()
        self.stop = threading.Event()

    def __call__(self, source: EncodedImage) -> ImageFacts:
        """The facts of an image, which several rows may share; a damaged image gives a fault.

        Raises MemoryError, in all rows that wait for the image, if memory does not suffice to
        decode it.
        """
        with self._lock:
            future = self._facts.get(source)
            is_first = future is None
            if future is None:
                future = self._facts[source] = Future()
                while len(self._facts) > KEPT:
                    self._facts.popitem(last=False)
            self._facts.move_to_end(source)
        if is_first:
            try:
                facts = self._read(source)
                with self._lock:
                    self._depths[facts.bits] += 1
                future.set_result(facts)
            except MemoryError as error:
                future.set_exception(error)
        return future.result()

    def depths(self) -> Mapping[int, int]:
        """The number of images that were read, by the depth of their values in bits."""
        return self._depths

    def save(self) -> Path | None:
        """Writes the store if enough images were decoded. Returns its path, or None if it was not
        written."""
        with self._lock:
            if self._decoded < STORE_PICTURES and self._pixels < STORE_PIXELS:
                return None
            path = self._store.save() if self._store else None
            if path:
                self._decoded = self._pixels = 0
            return path

    def _read(self, source: EncodedImage) -> ImageFacts:
        """The facts of an image, from the store or by decoding."""
        try:
            now, state = time.time_ns(), _state(source)
            with self._lock:
                facts = self._store.get(self._name(source), state) if self._store else None
            facts = facts or self._decode(source, state, _settled(state, now))
            if not facts.fault:
                check_size(facts.size, self._max_pixels)
            return facts
        except DataError as error:
            return ImageFacts((0, 0), b"", f"{short(source)}: {error}")
        except MemoryError:
            raise
        except Exception as error:  # other rows may wait for this image, so the error is a result
            reason = getattr(error, "strerror", None) or type(error).__name__
            return ImageFacts((0, 0), b"", f"image cannot be read: {short(source)}: {reason}")

    def _name(self, source: EncodedImage) -> str:
        """The name of an image in the store: the path relative to the data file if it lies below,
        so that it does not depend on the working folder."""
        if isinstance(source, Picture):
            return source.name
        below = source.is_relative_to(self._folder)
        return str(source.relative_to(self._folder) if below else source)

    def _decode(self, source: EncodedImage, before: list[int], settled: bool) -> ImageFacts:
        """Decodes an image. The result is stored if the files that hold it have not changed from
        the state `before`, and are `settled`."""
        try:
            if isinstance(source, Picture):
                content = Loaded(source.name, (), source.read())
                size, bits, turned = self._measure(content)
                digest = hashlib.sha256(content.content).digest()
            else:
                size, bits, turned = self._measure(source)
                with source.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").digest()
        except (DataError, OSError) as error:
            return ImageFacts((0, 0), b"", str(error))
        facts = ImageFacts(size, digest, "", bits, turned)
        if settled and self._store and before == _state(source):
            with self._lock:
                self._store.add(self._name(source), before, facts)
                self._decoded += 1
                self._pixels += size[0] * size[1]
        return facts

    def _measure(self, source: EncodedImage) -> tuple[tuple[int, int], int, int]:
        """Decodes an image within the budget of pixels. Returns upright (width, height), depth in
        bits, and EXIF orientation. Raises DataError."""
        with (
            opened(source, self._max_pixels) as image,
            self._budget.hold(image.width * image.height),
        ):
            return *measured(image), orientation(image)


@dataclass(frozen=True)
class Loaded(Picture):
    """A picture whose content is in memory."""

    content: bytes = field(repr=False, compare=False)

    def read(self) -> bytes:
        """The content."""
        return self.content


class PixelBudget:
    """Bounds the number of pixels that all threads decode at once."""

    def __init__(self, pixels: int) -> None:
        self._pixels = pixels
        self._in_use = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Takes `pixels` of the budget while the block runs, and waits until they are free. An
        image above the whole budget waits until it is alone."""
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._in_use + pixels <= self._pixels)
            self._in_use += pixels
        try:
            yield
        finally:
            with self._changed:
                self._in_use -= pixels
                self._changed.notify_all()


def _state(source: EncodedImage) -> list[int]:
    """Size, inode, modification time and change time of a file; of several files the sums, and the
    latest times. Empty if a file cannot be read."""
    files = source.files if isinstance(source, Picture) else (source,)
    try:
        states = [file.stat() for file in files]
    except (OSError, ValueError):
        return []
    if not states:
        return []
    return [
        sum(state.st_size for state in states),
        sum(state.st_ino for state in states),
        max(state.st_mtime_ns for state in states),
        max(state.st_ctime_ns for state in states),
    ]


def _settled(state: list[int], now: int) -> bool:
    """Whether a change after `now`, in ns, would show in the file's times, which advance in
    steps."""
    if not state:
        return False
    *_, modified, changed = state
    coarse = modified % 1_000_000_000 == 0
    return now - max(modified, changed) > (2 if coarse else SETTLED) * 1e9
