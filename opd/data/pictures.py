"""Reads sizes and hashes of image files. Every image is decoded once; a store beside the data file
records the results for the next run.

The store is a cache and may be deleted. An entry is valid only for a file with the same size,
inode, modification time and change time. A damaged store is ignored and overwritten.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from opd.data.images import check_size, measured, opened, short
from opd.errors import DataError
from opd.paths import read_file

VERSION = 1
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
    """The result of reading an image file: upright `size` (width, height) in pixels, and `digest`,
    the SHA-256 of the file; or the `fault`, for a message.

    `bits`: the depth of the values of a 16-bit image; 8 for any other image.
    """

    size: tuple[int, int]
    digest: bytes
    fault: str = ""
    bits: int = 8


class Pictures:
    """Reads images for the rows of a data file; safe for threads. `store`: the data file whose
    store is used; None: no store."""

    def __init__(self, max_pixels: int, store: Path | None = None) -> None:
        self._max_pixels = max_pixels
        self._store = store
        self._stored = [] if store is None else [_load(path) for path in store_paths(store)]
        self._facts: dict[Path, Future[ImageFacts]] = {}
        self._lock = threading.Lock()
        self._budget = PixelBudget(POOL_PIXELS)
        self._new: dict[str, list[Any]] = {}
        self._pixels = 0

    def __call__(self, path: Path) -> ImageFacts:
        """The facts of an image, which several rows may share; a damaged image gives a fault.

        Raises MemoryError, in all rows that wait for the image, if memory does not suffice to
        decode it.
        """
        with self._lock:
            future = self._facts.get(path)
            is_first = future is None
            if future is None:
                future = self._facts[path] = Future()
        if is_first:
            try:
                future.set_result(self._read(path))
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

    def _read(self, path: Path) -> ImageFacts:
        """The facts of an image, from the store or by decoding."""
        try:
            now, state = time.time_ns(), _state(path)
            facts = self._from_store(path, state)
            facts = facts or self._decode(path, state, _settled(state, now))
            if not facts.fault:
                check_size(facts.size, self._max_pixels)
            return facts
        except DataError as error:
            return ImageFacts((0, 0), b"", f"{short(path)}: {error}")
        except MemoryError:
            raise
        except Exception as error:  # other rows may wait for this image, so the error is a result
            reason = getattr(error, "strerror", None) or type(error).__name__
            return ImageFacts((0, 0), b"", f"image cannot be read: {short(path)}: {reason}")

    def _from_store(self, path: Path, state: list[int]) -> ImageFacts | None:
        """The stored facts of an image; None if there is no valid entry for a file in this
        `state`."""
        for stored in self._stored:
            entry = stored.get(self._name(path))
            if not isinstance(entry, list) or len(entry) != 8 or not state or entry[:4] != state:
                continue
            *_, width, height, digest, bits = entry
            if (
                type(width) is type(height) is type(bits) is int
                and min(width, height) > 0
                and _DIGEST.fullmatch(str(digest))
            ):
                return ImageFacts((width, height), bytes.fromhex(digest), bits=bits)
        return None

    def _name(self, path: Path) -> str:
        """The name of an image in the store: the path relative to the data file if it lies below,
        so that it does not depend on the working folder."""
        folder = self._store.parent if self._store else Path()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def _decode(self, path: Path, before: list[int], settled: bool) -> ImageFacts:
        """Decodes an image. The result is stored if the file has not changed from the state
        `before`, and is `settled`."""
        try:
            with (
                opened(path, self._max_pixels) as image,
                self._budget.hold(image.width * image.height),
            ):
                size, bits = measured(image)
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
        except (DataError, OSError) as error:
            return ImageFacts((0, 0), b"", str(error))
        if settled and before == _state(path):
            with self._lock:
                self._new[self._name(path)] = [*before, *size, digest.hex(), bits]
                self._pixels += size[0] * size[1]
        return ImageFacts(size, digest, bits=bits)


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
    """The two possible paths of the store of a data file: beside it, and in the user's cache folder
    ($XDG_CACHE_HOME, else ~/.cache)."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    key = hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:16]
    return (
        data.with_name(f".{data.name}.opd-pictures"),
        cache / "opd" / f"{data.name[:80]}-{key}.opd-pictures",
    )


def _load(path: Path) -> dict[str, Any]:
    """The entries of a store; empty if the store is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        store = json.loads(read_file(path))
        if store["version"] == VERSION and isinstance(store["pictures"], dict):
            return dict(store["pictures"])
    return {}


def _state(path: Path) -> list[int]:
    """Size, inode, modification time and change time of a file; empty if it cannot be read."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return []
    return [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _settled(state: list[int], now: int) -> bool:
    """Whether a change after `now`, in ns, would show in the file's times, which advance in
    steps."""
    if not state:
        return False
    *_, modified, changed = state
    coarse = modified % 1_000_000_000 == 0
    return now - max(modified, changed) > (2 if coarse else SETTLED) * 1e9
