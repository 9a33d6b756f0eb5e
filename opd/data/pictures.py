"""Reads sizes and hashes of pictures. Every picture is decoded once; a store beside the data file
records the results for the next run.

The store is a cache and may be deleted. An entry is valid only while the files that hold the
picture have the same size, inode, modification time and change time. A damaged store is ignored
and overwritten.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

from opd.data.images import check_size, measured, opened, orientation, short
from opd.errors import DataError
from opd.paths import cache_folder, read_file
from opd.types import EncodedImage, Picture

VERSION = 2
POOL_PIXELS = 1 << 27
"""Largest number of pixels that all threads decode at once: 134 million, half a gigabyte. An image
with more is decoded alone."""

STORE_PICTURES, STORE_PIXELS = 32, 1 << 25
"""The store is written if at least this many images, or pixels, were decoded; fewer are decoded in
no time."""

SETTLED = 0.2
"""If a file was last modified this many seconds ago, any later change shows in its times; 2 seconds
for file systems with times in whole seconds, such as FAT."""

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageFacts:
    """The result of reading a picture: upright `size` (width, height) in pixels, and `digest`, the
    SHA-256 of the encoded picture; or the `fault`, for a message.

    `bits`: the depth of the values of a 16-bit image; 8 for any other image. `orientation`: the
    EXIF orientation of the stored pixels, 1..8, of which 1 is upright.
    """

    size: tuple[int, int]
    digest: bytes
    fault: str = ""
    bits: int = 8
    orientation: int = 1


class Pictures:
    """Reads images for the rows of a data file; safe for threads. `store`: the data file whose
    store is used; None: no store. `stop` is set once reading has failed, so that whatever takes
    long ends."""

    def __init__(self, max_pixels: int, store: Path | None = None) -> None:
        self._max_pixels = max_pixels
        self._store = store
        self._stored = [] if store is None else [_load(path) for path in store_paths(store)]
        self._facts: dict[EncodedImage, Future[ImageFacts]] = {}
        self._lock = threading.Lock()
        self._budget = PixelBudget(POOL_PIXELS)
        self._new: dict[str, list[Any]] = {}
        self._pixels = 0
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
        if is_first:
            try:
                future.set_result(self._read(source))
            except MemoryError as error:
                future.set_exception(error)
        return future.result()

    def facts(self) -> list[ImageFacts]:
        """The facts of all images that were read."""
        return [
            future.result()
            for future in self._facts.values()
            if future.done() and not future.exception()
        ]

    def save(self) -> Path | None:
        """Writes the store if enough images were decoded: beside the data file, else in the user's
        cache folder. Returns the path of the store, or None if it was not written.

        If several processes write at the same time, the last store replaces the others as a whole.
        """
        if self._store is None or (len(self._new) < STORE_PICTURES and self._pixels < STORE_PIXELS):
            return None
        for path in store_paths(self._store):
            temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("x", encoding="utf-8") as file:
                    json.dump(
                        {"version": VERSION, "pictures": {**_load(path), **self._new}},
                        file,
                        sort_keys=True,
                    )
                os.replace(temporary, path)
                self._new = {}
                return path
            except OSError:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        return None

    def _read(self, source: EncodedImage) -> ImageFacts:
        """The facts of an image, from the store or by decoding."""
        try:
            now, state = time.time_ns(), _state(source)
            facts = self._from_store(source, state)
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

    def _from_store(self, source: EncodedImage, state: list[int]) -> ImageFacts | None:
        """The stored facts of an image; None if there is no valid entry for files in this
        `state`."""
        for stored in self._stored:
            entry = stored.get(self._name(source))
            if not isinstance(entry, list) or len(entry) != 9 or not state or entry[:4] != state:
                continue
            *_, width, height, digest, bits, turned = entry
            if (
                all(type(number) is int for number in (width, height, bits, turned))
                and min(width, height) > 0
                and _DIGEST.fullmatch(str(digest))
            ):
                return ImageFacts((width, height), bytes.fromhex(digest), "", bits, turned)
        return None

    def _name(self, source: EncodedImage) -> str:
        """The name of an image in the store: the path relative to the data file if it lies below,
        so that it does not depend on the working folder."""
        path = Path(source.name) if isinstance(source, Picture) else source
        folder = self._store.parent if self._store else Path()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

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
        if settled and before == _state(source):
            with self._lock:
                self._new[self._name(source)] = [*before, *size, digest.hex(), bits, turned]
                self._pixels += size[0] * size[1]
        return ImageFacts(size, digest, "", bits, turned)

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


def store_paths(data: Path) -> tuple[Path, Path]:
    """The two possible paths of the store of a data file: beside it, and in the user's cache
    folder."""
    key = hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:16]
    return (
        data.with_name(f".{data.name}.opd-pictures"),
        cache_folder() / f"{data.name[:80]}-{key}.opd-pictures",
    )


def _load(path: Path) -> dict[str, Any]:
    """The entries of a store; empty if the store is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        store = json.loads(read_file(path))
        if store["version"] == VERSION and isinstance(store["pictures"], dict):
            return dict(store["pictures"])
    return {}


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
