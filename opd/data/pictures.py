"""Sizes and hashes of picture files: each picture is decoded once, and what was learnt of it is
kept beside the data file.

The store holds nothing that cannot be learnt again. An entry counts only for a file with the same
size, inode, and times of its last change to content and to its record; a damaged store is ignored,
and written anew as a whole.
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
"""Pixels that all threads together decode at a time, 134 million: half a gigabyte. A larger picture
is decoded alone."""

WORTH_PICTURES, WORTH_PIXELS = 32, 1 << 25
"""The store is written once so many pictures, or pixels, were decoded: to read fewer again takes no
time."""

SETTLED = 0.2
"""Seconds after which a file's times tell of any later change; 2 where they are whole seconds, as
on FAT."""

_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class ImageFacts:
    """What reading an image file told: its upright (width, height) in pixels, the sha256 of the
    file, or the `fault`.

    `bits`: the bits that the values of a 16-bit picture fill, 8 for every other picture.
    """

    size: tuple[int, int]
    digest: bytes
    fault: str = ""
    bits: int = 8


class Pictures:
    """Reads pictures for the rows of one data file; safe for threads. `store`: the data file whose
    store is used, None for none."""

    def __init__(self, max_pixels: int, store: Path | None = None) -> None:
        self._max_pixels = max_pixels
        self._store = store
        self._kept = [] if store is None else [_load(place) for place in places(store)]
        self._known: dict[Path, Future[ImageFacts]] = {}
        self._lock = threading.Lock()
        self._budget = PixelBudget(POOL_PIXELS)
        self._new: dict[str, list[Any]] = {}
        self._pixels = 0

    def __call__(self, path: Path) -> ImageFacts:
        """What is known of a picture; a fault is a part of that, so that rows that share a picture
        share it.

        Raises MemoryError where the machine has no room for the pixels, to all rows that wait for
        them.
        """
        with self._lock:
            found = self._known.get(path)
            if found is None:
                mine = self._known[path] = Future()
        if found is None:
            try:
                mine.set_result(self._read(path))
            except MemoryError as error:
                mine.set_exception(error)
            found = mine
        return found.result()

    def facts(self) -> list[ImageFacts]:
        """All pictures that were asked for."""
        return [
            future.result()
            for future in self._known.values()
            if future.done() and not future.exception()
        ]

    def save(self) -> Path | None:
        """Writes the store where that is worth it: beside the data file, or else in the user's
        cache folder; its path, or None.

        Processes that write at the same time replace each other's store as a whole. What cannot be
        written is done without.
        """
        if self._store is None or (len(self._new) < WORTH_PICTURES and self._pixels < WORTH_PIXELS):
            return None
        for path in places(self._store):
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
        try:
            now, before = time.time_ns(), _state(path)
            found = self._of_store(path, before) or self._decode(
                path, before, _settled(before, now)
            )
            if not found.fault:
                check_size(found.size, self._max_pixels)
            return found
        except DataError as error:
            return ImageFacts((0, 0), b"", f"{short(path)}: {error}")
        except MemoryError:
            raise
        except Exception as error:  # the rows that wait for this picture must hear of it
            return ImageFacts(
                (0, 0),
                b"",
                f"image cannot be read: {short(path)}:"
                f" {getattr(error, 'strerror', None) or type(error).__name__}",
            )

    def _of_store(self, path: Path, state: list[int]) -> ImageFacts | None:
        for entry in (kept.get(self._name(path)) for kept in self._kept):
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
        """A picture's name in the store: a run may name the same data file from another folder."""
        folder = self._store.parent if self._store else Path()
        return str(path.relative_to(folder) if path.is_relative_to(folder) else path)

    def _decode(self, path: Path, before: list[int], settled: bool) -> ImageFacts:
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
    """Bounds the pixels that all threads hold together: each alone is bounded, and eight of them
    would fill the memory."""

    def __init__(self, pixels: int) -> None:
        self._pixels = pixels
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        """Waits until so many pixels fit; more than all fit where nobody else holds any."""
        pixels = min(pixels, self._pixels)
        with self._changed:
            self._changed.wait_for(lambda: self._held + pixels <= self._pixels)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


def places(data: Path) -> tuple[Path, Path]:
    """Where the store of a data file may be: beside it, or in the user's cache folder
    ($XDG_CACHE_HOME, else ~/.cache)."""
    cache = Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"))
    key = hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:16]
    return (
        data.with_name(f".{data.name}.opd-pictures"),
        cache / "opd" / f"{data.name[:80]}-{key}.opd-pictures",
    )


def _load(path: Path) -> dict[str, Any]:
    """The entries of a store; none where it is missing or damaged."""
    with suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
        found = json.loads(read_file(path))
        if found["version"] == VERSION and isinstance(found["pictures"], dict):
            return dict(found["pictures"])
    return {}


def _state(path: Path) -> list[int]:
    """Size, inode and times of a file; empty where it has none."""
    try:
        found = path.stat()
    except (OSError, ValueError):
        return []
    return [found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def _settled(state: list[int], now: int) -> bool:
    """Whether a change from `now` on, in ns, would show in a file's times, which advance in
    steps."""
    if not state:
        return False
    *_, modified, changed = state
    coarse = modified % 1_000_000_000 == 0
    return now - max(modified, changed) > (2 if coarse else SETTLED) * 1e9
