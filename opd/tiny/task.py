"""The embedded task: scenes with coloured tiles that show digits, each drawn from split and index
alone, without files, network or global random state.

A scene is a shaded, noisy background with muted clutter and tiles of distinct colours, each with
one digit. The question asks for the digit of one colour, and the evidence box is that tile.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args, overload

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from opd.types import Box, Example

Split: TypeAlias = Literal["pretrain", "train", "choice", "fresh"]
"""The use of a scene: "pretrain" to train the embedded model, "train" for runs, "choice" to make
decisions about the method, "fresh" to report numbers."""

SPLITS: tuple[Split, ...] = get_args(Split)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 40, 45),
    "orange": (240, 135, 25),
    "yellow": (240, 220, 60),
    "green": (45, 150, 60),
    "cyan": (70, 205, 215),
    "blue": (40, 70, 205),
    "purple": (130, 45, 165),
    "pink": (245, 145, 195),
}
TILE = 18
"""Side of a tile in pixels."""
MARGIN = 6
"""Free pixels between a tile and the border of the canvas, so that a crop with this margin stays
inside."""
GAP = 2
"""Free pixels between two tiles along x or along y."""

GLYPHS = (
    ".###. #...# #..## #.#.# ##..# #...# .###.",
    "..#.. .##.. ..#.. ..#.. ..#.. ..#.. .###.",
    ".###. #...# ....# ...#. ..#.. .#... #####",
    "##### ...#. ..#.. ...#. ....# #...# .###.",
    "...#. ..##. .#.#. #..#. ##### ...#. ...#.",
    "##### #.... ####. ....# ....# #...# .###.",
    "..##. .#... #.... ####. #...# #...# .###.",
    "##### ....# ...#. ..#.. .#... .#... .#...",
    ".###. #...# #...# .###. #...# #...# .###.",
    ".###. #...# #...# .#### ....# ...#. .##..",
)
"""The ten digits as rows of 5 x 7 marks."""


def draw_glyph(glyph: str) -> Image.Image:
    """A mask of 10 x 14 pixels of an entry of GLYPHS."""
    marks = np.array([[mark == "#" for mark in row] for row in glyph.split()])
    return Image.fromarray(np.kron(marks, np.full((2, 2), 255)).astype(np.uint8))


MASKS = tuple(draw_glyph(glyph) for glyph in GLYPHS)

TILE_LOW, TILE_HIGH = [-12, -12, -12, 0, -1, -1], [13, 13, 13, 40, 2, 2]
"""Bounds of the random numbers that `draw_tile` takes; one call draws them for all tiles of a
scene."""


@dataclass(frozen=True)
class Tile:
    """One tile of a scene: its `colour` by name, the `digit` it shows, and its upper left corner
    `x`, `y` in pixels."""

    colour: str
    digit: int
    x: int
    y: int

    @property
    def box(self) -> Box:
        """The tile's square in pixels."""
        return Box(self.x, self.y, self.x + TILE, self.y + TILE)


@dataclass(frozen=True)
class Scene:
    """A drawn scene with all of its tiles; the question asks for the digit of `target`."""

    image: Image.Image
    tiles: tuple[Tile, ...]
    target: Tile

    @property
    def question(self) -> str:
        """The question, which does not contain the answer."""
        return f"What digit is on the {self.target.colour} tile?"

    @property
    def answer(self) -> str:
        """The only correct answer."""
        return f"The {self.target.colour} tile shows {self.target.digit}."


class Scenes(Sequence[Example]):
    """A sequence of `count` examples, each drawn on access. Item i depends only on i and on the
    arguments other than `count`.

    `split`: a Split. `tiles` in 1..8 are placed on a canvas of `size` x `size` pixels. With
    `labelled` False the examples have no answer and are otherwise the same. Scenes of different
    splits, tiles or sizes are independent. Raises ValueError for arguments out of range.
    """

    def __init__(
        self, split: str, count: int, tiles: int = 8, size: int = 128, labelled: bool = True
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}, but must be one of {', '.join(SPLITS)}")
        if count < 0:
            raise ValueError(f"count is {count}, but must not be negative")
        if not 1 <= tiles <= len(COLOURS):
            raise ValueError(
                f"tiles is {tiles}, but must be 1 to {len(COLOURS)}: no two tiles share a colour"
            )
        if (
            2 * tiles > max(2, ((size - 2 * MARGIN + GAP) // (TILE + GAP)) ** 2)
            or size < TILE + 2 * MARGIN
        ):
            raise ValueError(f"size is {size}, which is too small for {tiles} tiles")
        self.split: Split = split
        self._length = count
        self.tiles = tiles
        self.size = size
        self.labelled = labelled

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        """The example at `index`; a slice gives a tuple of examples, all drawn at once."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(self._length)))
        if not -self._length <= index < self._length:
            raise IndexError(f"scene {index} of {self._length}")
        index %= self._length
        scene = self.scene(index)
        return Example(
            id=f"tiny-{self.split}-{index:06d}",
            images=(scene.image,),
            question=scene.question,
            boxes=(scene.target.box,),
            answer=scene.answer if self.labelled else None,
            source=f"opd.tiny {self.split}, {self.tiles} tiles",
        )

    def scene(self, index: int) -> Scene:
        """The scene at `index`, including the other tiles, which an example does not list."""
        name = f"opd.tiny/{self.split}/{self.tiles}/{self.size}/{index}"
        key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u8")
        return draw_scene(np.random.Generator(np.random.Philox(key=key)), self.tiles, self.size)


def draw_scene(random: np.random.Generator, tiles: int, size: int) -> Scene:
    """Draws one scene: background, clutter, tiles, and noise over the whole image."""
    names = random.permutation(list(COLOURS))[:tiles]
    digits = random.integers(0, 10, tiles)
    corners = place_tiles(random, tiles, size)
    placed = tuple(
        Tile(str(name), int(digit), int(x), int(y))
        for name, digit, (x, y) in zip(names, digits, corners, strict=True)
    )
    image = draw_background(random, size)
    canvas = ImageDraw.Draw(image)
    draw_clutter(random, canvas, size)
    variations = random.integers(TILE_LOW, TILE_HIGH, (tiles, len(TILE_LOW))).tolist()
    for tile, numbers in zip(placed, variations, strict=True):
        draw_tile(canvas, tile, numbers)
    noise = Image.fromarray(random.integers(0, 21, (size, size, 3), dtype=np.uint8))
    return Scene(
        ImageChops.add(image, noise, offset=-10), placed, placed[int(random.integers(tiles))]
    )


def place_tiles(random: np.random.Generator, tiles: int, size: int) -> list[tuple[int, int]]:
    """Upper left corners (x, y) of tiles that do not touch. If there is no space for the next tile,
    the placement starts over."""
    pitch = TILE + GAP
    while True:
        corners: list[tuple[int, int]] = []
        for x, y in random.integers(MARGIN, size - MARGIN - TILE + 1, (8 * tiles + 24, 2)).tolist():
            if all(abs(x - u) >= pitch or abs(y - v) >= pitch for u, v in corners):
                corners.append((x, y))
                if len(corners) == tiles:
                    return corners


def draw_background(random: np.random.Generator, size: int) -> Image.Image:
    """Draws a muted colour that changes smoothly from corner to corner."""
    grey = random.integers(70, 190)
    light = random.integers(-35, 36, (2, 2, 1))
    corners = grey + light + random.integers(-14, 15, (2, 2, 3))
    return Image.fromarray(corners.astype(np.uint8)).resize(
        (size, size), Image.Resampling.BILINEAR, box=(0.5, 0.5, 1.5, 1.5)
    )


def draw_clutter(random: np.random.Generator, canvas: ImageDraw.ImageDraw, size: int) -> None:
    """Draws muted bars and blobs, in proportion to the area: about 24 on 128 x 128 pixels."""
    shapes = max(4, size * size // 680)
    centres = random.integers(0, size, (shapes, 2)).tolist()
    halves = random.integers(1, 9, (shapes, 2)).tolist()
    colours = np.clip(
        random.integers(50, 206, (shapes, 1)) + random.integers(-18, 19, (shapes, 3)), 0, 255
    ).tolist()
    for number, ((x, y), (width, height), colour) in enumerate(
        zip(centres, halves, colours, strict=True)
    ):
        outline = (x - width, y - height, x + width, y + height)
        if number % 2:
            canvas.ellipse(outline, fill=tuple(colour))
        else:
            canvas.rectangle(outline, fill=tuple(colour))


def draw_tile(canvas: ImageDraw.ImageDraw, tile: Tile, numbers: Sequence[int]) -> None:
    """Draws a tile in a shade of its colour, with a digit up to a pixel off the centre, light on
    dark or dark on light.

    `numbers`: the changes of red, green and blue, the brightness of the ink, and the digit's offset
    in x and y.
    """
    *shade, ink, left, top = numbers
    fill = tuple(
        min(255, max(0, value + change))
        for value, change in zip(COLOURS[tile.colour], shade, strict=True)
    )
    canvas.rectangle((tile.x, tile.y, tile.x + TILE - 1, tile.y + TILE - 1), fill=fill)
    bright = 0.299 * fill[0] + 0.587 * fill[1] + 0.114 * fill[2] > 140
    ink += 0 if bright else 216
    canvas.bitmap((tile.x + 4 + left, tile.y + 2 + top), MASKS[tile.digit], fill=(ink, ink, ink))
