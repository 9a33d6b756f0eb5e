"""How an image stands in a prompt: its text with one image token a tile, and what each tile's
visual tokens look at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.types import FloatArray, IntArray


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image that the vision tower sees as `grid` (rows, columns) of visual
    tokens, in reading order.

    `region` is left, top, right, bottom in fractions of the image.
    """

    grid: tuple[int, int]
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def tokens(self) -> int:
        """Visual tokens of the tile."""
        return self.grid[0] * self.grid[1]

    def boxes(self, width: int, height: int) -> FloatArray:
        """What each visual token looks at: [tokens, 4], left, top, right, bottom in pixels of the
        image."""
        rows, columns = self.grid
        row, column = np.divmod(np.arange(self.tokens), columns)
        left, top, right, bottom = np.array(self.region) * (width, height, width, height)
        across, down = (right - left) / columns, (bottom - top) / rows
        corners = [
            left + column * across,
            top + row * down,
            left + (column + 1) * across,
            top + (row + 1) * down,
        ]
        return np.stack(corners, axis=1).astype(np.float32)


@dataclass(frozen=True)
class Layout:
    """`text` takes the place of the chat template's placeholder; the k-th image token in it stands
    for all tokens of `tiles[k]`."""

    text: str
    tiles: tuple[Tile, ...]


def token(tokenizer: Any, name: str, usual: str) -> str:
    """The token that a tokenizer keeps under `name`, such as "image_token", or the `usual` one."""
    return str(getattr(tokenizer, name, None) or usual)


def counted(tokens: IntArray) -> IntArray:
    """Positions of a model that numbers tokens one by one: int32 [1, P]."""
    return np.arange(len(tokens), dtype=np.int32)[None]


def plain(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Floats are features and integers are shapes in every family; backends get one width of
    each."""
    return np.ascontiguousarray(
        values, dtype=np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32
    )
