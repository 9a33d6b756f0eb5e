"""The store of sizes and hashes of pictures, beside the data file or in the user's cache folder.

It is a cache and may be deleted. An entry holds for one state of the files that hold the picture. A
damaged store is ignored and overwritten. A million pictures take 74 MB.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from opd.paths import cache_folder, read_file

MAGIC = b"opd pictures 3\n"
"""The beginning of a store, with the version of its format."""

CHECKSUM = 16
"""Number of bytes of the checksum of all records, which follows."""

PENDING = 4096
"""Largest number of new entries that are not yet sorted among the others; a quarter of them, where
that is more."""

RECORD = np.dtype(
    [
        ("name", "<u8"),  # the first half of the hash of the name, by which records are sorted
        ("rest", "<u8"),
        ("state", "<u8", 2),
        ("size", "<u4", 2),
        ("bits", "u1"),
        ("orientation", "u1"),
        ("digest", "u1", 32),
    ]
)

Records: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
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


class PictureStore:
    """The store of the pictures of a data file. Not safe for threads."""

    def __init__(self, data: Path) -> None:
        self._data = data
        beside, cached = store_paths(data)
        self._records = _merged(_load(beside), _load(cached))
        self._new: dict[tuple[int, int], Records] = {}

    def get(self, name: str, state: Sequence[int]) -> ImageFacts | None:
        """The facts of the picture `name` in this `state` of its files; None if they are not
        known."""
        key, names = _hash(name), self._records["name"]
        record = self._new.get(key)
        place = bisect_left(names, key[0])
        while record is None and place < len(names) and names[place] == key[0]:
            found = self._records[place]
            record = found if found["rest"] == key[1] else None
            place += 1
        if record is None or tuple(record["state"].tolist()) != _hash(repr(list(state))):
            return None
        width, height = record["size"].tolist()
        digest, bits, turned = record["digest"].tobytes(), record["bits"], record["orientation"]
        return ImageFacts((width, height), digest, "", int(bits), int(turned))

    def add(self, name: str, state: Sequence[int], facts: ImageFacts) -> None:
        """Puts facts into the store, which is written by `save`."""
        record = np.zeros((), RECORD)
        record["name"], record["rest"] = key = _hash(name)
        record["state"], record["size"] = _hash(repr(list(state))), facts.size
        record["bits"], record["orientation"] = facts.bits, facts.orientation
        record["digest"] = np.frombuffer(facts.digest, np.uint8)
        self._new[key] = record
        if len(self._new) > max(PENDING, len(self._records) // 4):
            self._sort()

    def save(self) -> Path | None:
        """Writes the store beside the data file, else into the user's cache folder. Returns its
        path, or None if it could not be written.

        If several processes write at the same time, the last store replaces the others as a whole.
        """
        self._sort()
        for path in store_paths(self._data):
            temporary = path.with_name(f"{path.name}.{uuid4().hex[:8]}.partial")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with temporary.open("xb") as file:
                    file.write(MAGIC + _checksum(self._records) + self._records.tobytes())
                os.replace(temporary, path)
                return path
            except OSError:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        return None

    def _sort(self) -> None:
        if self._new:
            self._records = _merged(self._records, np.stack([*self._new.values()]))
            self._new = {}


def store_paths(data: Path) -> tuple[Path, Path]:
    """The two possible paths of the store of a data file: beside it, and in the user's cache
    folder."""
    key = hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:16]
    return (
        data.with_name(f".{data.name}.opd-pictures"),
        cache_folder() / f"{data.name[:80]}-{key}.opd-pictures",
    )


def _load(path: Path) -> Records:
    """The records of a store; none if the store is missing or damaged."""
    content = b""
    with suppress(OSError):
        content = read_file(path)
    start = len(MAGIC) + CHECKSUM
    if not content.startswith(MAGIC) or (len(content) - start) % RECORD.itemsize:
        return np.empty(0, RECORD)
    records = np.frombuffer(content, RECORD, offset=start)
    return records if content[len(MAGIC) : start] == _checksum(records) else np.empty(0, RECORD)


def _merged(old: Records, new: Records) -> Records:
    """The records of both in order; of two of one picture, the new one. `old` is in order."""
    if not len(new):
        return old
    records = np.concatenate([old, new])
    order = np.lexsort((np.arange(len(records)), records["rest"], records["name"]))
    records = records[order]
    names = records[["name", "rest"]]
    last = np.ones(len(records), bool)
    last[:-1] = names[1:] != names[:-1]
    return records[last]


def _hash(text: str) -> tuple[int, int]:
    """A hash of 128 bits, in two halves."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def _checksum(records: Records) -> bytes:
    return hashlib.blake2b(records.view(np.uint8).data, digest_size=CHECKSUM).digest()
