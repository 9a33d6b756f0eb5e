"""Finds pictures that are the same, or nearly: exact copies by content, and near ones by a
perceptual hash.

A picture is known by its name: several rows about one file show one picture. A picture without a
file of its own is known by its content.
"""

from __future__ import annotations

import hashlib
import os
import threading
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opd.data.embedded import Embedded
from opd.data.images import open_image, opened, upright_rgb
from opd.data.pictures import POOL_PIXELS, PixelBudget
from opd.errors import DataError
from opd.types import Example, ImageSource

BITS = 4
"""Bits of 64 by which the hashes of near pictures differ at most. A picture that is saved as JPEG
again, or resized, differs by 0 to 2; two photographs differ by about 32."""

SHADES = 8
"""Largest difference between the mean colours of near pictures, of 255, in red, green and blue: the
hash sees shapes alone."""

RULE = (
    f"exact: equal content under another name; near: ImageHash phash differs by at most {BITS} of"
    f" 64 bits, and mean red, green and blue by at most {SHADES} of 255"
)
"""The rule in words."""

BANDS = 6
"""Parts of a hash. Two hashes that differ by at most BITS bits agree in BANDS - BITS parts."""

COMPARED = 64
"""Pictures with equal parts that each picture is compared with at most, so that the time does not
grow with the square of their number."""

DRAFT = 256
"""A JPEG is decoded at the smallest scale that has this many pixels on each side: the hash reads
32 x 32."""

Numbers: TypeAlias = NDArray[np.uint64]


def check_installed() -> None:
    """Raises DataError, with the command that installs it, if ImageHash is missing."""
    try:
        import imagehash  # noqa: F401
    except ImportError as error:
        raise DataError(
            "near-duplicates are found with ImageHash, which is missing:"
            " pip install 'vision-opd[data]'"
        ) from error


@dataclass(frozen=True)
class Print:
    """A picture as duplicates are found by it: 64 bits each of the hashes of its `name` and its
    `content`, its perceptual hash `look`, and its mean colour in 0..255."""

    name: int
    content: int
    look: int
    colour: tuple[int, int, int]


@dataclass(frozen=True)
class Seen:
    """The pictures of a row: the names of all, and the prints of those that no other row has
    given."""

    names: list[int]
    new: list[Print]


@dataclass
class Prints:
    """The prints of many rows, about 50 bytes a picture; rows are added in their order."""

    shown: array[int] = field(default_factory=lambda: array("Q"))
    """Names of the pictures of all rows."""
    places: array[int] = field(default_factory=lambda: array("Q"))
    """Place of the row of each of `shown`."""
    names: array[int] = field(default_factory=lambda: array("Q"))
    contents: array[int] = field(default_factory=lambda: array("Q"))
    looks: array[int] = field(default_factory=lambda: array("Q"))
    colours: array[int] = field(default_factory=lambda: array("B"))

    def add(self, place: int, seen: Seen) -> None:
        """Adds the row at a place."""
        self.shown.extend(seen.names)
        self.places.extend([place] * len(seen.names))
        for each in seen.new:
            self.names.append(each.name)
            self.contents.append(each.content)
            self.looks.append(each.look)
            self.colours.extend(each.colour)

    def places_of(self, names: Numbers) -> list[int]:
        """The places of all rows that show one of the pictures, ascending."""
        shown = np.isin(np.array(self.shown, np.uint64), names)
        return np.unique(np.array(self.places, np.int64)[shown]).tolist()  # type: ignore[no-any-return]

    def table(self) -> Table:
        """The pictures as arrays, in the order of their first rows."""
        shown, first = np.unique(np.array(self.shown, np.uint64), return_index=True)
        names = np.array(self.names, np.uint64)
        places = np.array(self.places, np.int64)[first][np.searchsorted(shown, names)]
        order = np.argsort(places, kind="stable")
        colours = np.array(self.colours, np.int16).reshape(-1, 3)
        return Table(
            names[order],
            places[order],
            np.array(self.contents, np.uint64)[order],
            np.array(self.looks, np.uint64)[order],
            colours[order],
        )


@dataclass(frozen=True)
class Table:
    """N pictures: `names`, `contents`, `looks` [N], `colours` [N, 3], and `places` [N], the place
    of the first row that shows each, ascending."""

    names: Numbers
    places: NDArray[np.int64]
    contents: Numbers
    looks: Numbers
    colours: NDArray[np.int16]

    def __len__(self) -> int:
        return len(self.names)


class Printer:
    """Takes the prints of rows' pictures, each picture once; safe for threads.

    `digest` gives the SHA-256 of a picture's content.
    """

    def __init__(self, digest: Callable[[ImageSource], bytes]) -> None:
        self._digest = digest
        self._taken: set[int] = set()
        self._lock = threading.Lock()
        self._budget = PixelBudget(POOL_PIXELS)

    def __call__(self, example: Example) -> Seen:
        """The pictures of an example. Raises DataError for one that cannot be decoded."""
        names: list[int] = []
        new: list[Print] = []
        for source in example.images:
            content = _bits(self._digest(source))
            name = _name(source)
            key = content if name is None else _bits(hashlib.sha256(name).digest())
            names.append(key)
            with self._lock:
                is_first = key not in self._taken
                self._taken.add(key)
            if is_first:
                look, colour = self._look(source, example.max_image_pixels)
                new.append(Print(key, content, look, colour))
        return Seen(names, new)

    def _look(self, source: ImageSource, max_pixels: int) -> tuple[int, tuple[int, int, int]]:
        if isinstance(source, Image.Image):
            return look(open_image(source))
        with opened(source, max_pixels) as image:
            image.draft("RGB", (DRAFT, DRAFT))
            with self._budget.hold(image.width * image.height):
                return look(upright_rgb(image))


def look(image: Image.Image) -> tuple[int, tuple[int, int, int]]:
    """The perceptual hash of an RGB image, 64 bits, and its mean colour in 0..255."""
    from imagehash import phash

    hashed = np.packbits(phash(image).hash.ravel()).tobytes()
    red, green, blue = np.asarray(image.resize((1, 1), Image.Resampling.BOX))[0, 0].tolist()
    return int.from_bytes(hashed), (red, green, blue)


def duplicates(table: Table) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of pictures, as two arrays [N]: the index of an earlier picture with the same content,
    and of an earlier one that is near; -1: there is none. A picture with a copy is near none."""
    count = len(table)
    _, first, inverse = np.unique(table.contents, return_index=True, return_inverse=True)
    earliest = first[inverse]
    exact = np.where(earliest < np.arange(count), earliest, -1)
    near = np.full(count, count)
    for earlier, later in neighbours(table.looks, table.colours):
        np.minimum.at(near, later, earlier)
    return exact, np.where((near < count) & (exact < 0), near, -1)


def shared(table: Table, other: Table) -> NDArray[np.bool_]:
    """Whether each picture of `table` [N] is in `other`: by name, content, or as a near one."""
    both = np.isin(table.names, other.names) | np.isin(table.contents, other.contents)
    looks = np.concatenate([other.looks, table.looks])
    colours = np.concatenate([other.colours, table.colours])
    for earlier, later in neighbours(looks, colours):
        across = (earlier < len(other)) & (later >= len(other))
        both[later[across] - len(other)] = True
    return both


def neighbours(
    looks: Numbers, colours: NDArray[np.int16]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields pairs (earlier, later) of indices of near pictures, some of them more than once.

    Only hashes that agree in BANDS - BITS parts are compared: they are sorted by these parts, then
    by the others, and each is compared with the next ones, COMPARED at most.
    """
    edges = [64 * band // BANDS for band in range(BANDS + 1)]
    masks = [(1 << end) - (1 << start) for start, end in pairwise(edges)]
    for parts in combinations(masks, BANDS - BITS):
        keys = looks & np.uint64(sum(parts))
        order = np.lexsort((looks, keys))
        keys = keys[order]
        starts = np.arange(len(keys))
        for distance in range(1, COMPARED + 1):
            starts = starts[starts + distance < len(keys)]
            starts = starts[keys[starts] == keys[starts + distance]]
            if not len(starts):
                break
            one, other = order[starts], order[starts + distance]
            earlier, later = np.minimum(one, other), np.maximum(one, other)
            near = np.bitwise_count(looks[earlier] ^ looks[later]) <= BITS
            near &= (np.abs(colours[earlier] - colours[later]) <= SHADES).all(axis=1)
            yield earlier[near], later[near]


def _name(source: ImageSource) -> bytes | None:
    """The name of a picture; None for one inside a row, or in memory."""
    if isinstance(source, Image.Image | Embedded):
        return None
    return os.fsencode(os.path.abspath(source) if isinstance(source, Path) else source.name)


def _bits(digest: bytes) -> int:
    """The first 64 bits of a hash."""
    return int.from_bytes(digest[:8])
