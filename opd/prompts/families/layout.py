"""The layout of an image in a prompt: a text with one image token for each tile, and the part of
the image that each visual token covers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.types import FloatArray, IntArray


@dataclass(frozen=True)
class Tile:
    """A rectangle of an image, which the vision tower turns into `grid` (rows, columns) of visual
    tokens, in reading order.

    `region` is left, top, right, bottom in fractions of the image.
    """

    grid: tuple[int, int]
    region: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)

    @property
    def tokens(self) -> int:
        """Number of visual tokens of the tile."""
        return self.grid[0] * self.grid[1]

    def boxes(self, width: int, height: int) -> FloatArray:
        """The rectangle that each visual token covers: [tokens, 4], left, top, right, bottom in
        pixels of an image of `width` x `height`."""
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
    """The layout of one image: `text` replaces the chat template's placeholder, and the k-th image
    token in `text` stands for all visual tokens of `tiles[k]`."""

    text: str
    tiles: tuple[Tile, ...]


def token(tokenizer: Any, name: str, usual: str) -> str:
    """The tokenizer's attribute `name`, such as "image_token"; the `usual` token if it has none."""
    return str(getattr(tokenizer, name, None) or usual)


def counted(tokens: IntArray) -> IntArray:
    """Consecutive positions from 0: int32 [1, P] for `tokens` [P]."""
    return np.arange(len(tokens), dtype=np.int32)[None]


def plain(values: NDArray[np.generic]) -> NDArray[np.generic]:
    """The array as backends get it: floats (features) as float32, integers (shapes) as int32."""
    return np.ascontiguousarray(
        values, dtype=np.float32 if np.issubdtype(values.dtype, np.floating) else np.int32
    )
