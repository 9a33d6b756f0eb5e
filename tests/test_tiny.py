"""The embedded task: scenes are what they were when the shipped model learned them, and show what
they say."""

from __future__ import annotations

import numpy as np
import pytest

from opd.tiny.task import COLOURS, MASKS, TILE, TILE_HIGH, TILE_LOW, Scenes


def test_the_numbers_of_all_tiles_are_those_that_single_calls_draw() -> None:
    # A generator that took other numbers for arrays than for scalars would give every scene other
    # pixels.
    together, alone = (np.random.Generator(np.random.Philox(key=3)) for _ in range(2))
    drawn = together.integers(TILE_LOW, TILE_HIGH, (50, len(TILE_LOW)))
    assert drawn.tolist() == [
        [int(alone.integers(low, high)) for low, high in zip(TILE_LOW, TILE_HIGH, strict=True)]
        for _ in drawn
    ]
    assert together.integers(2**40) == alone.integers(2**40)


@pytest.mark.parametrize("index", range(20))
def test_every_tile_shows_its_digit_in_its_colour(index: int) -> None:
    scene = Scenes("choice", 20).scene(index)
    pixels = np.asarray(scene.image).astype(int)
    assert len({tile.colour for tile in scene.tiles}) == len(scene.tiles) == 8
    for tile in scene.tiles:
        its = pixels[tile.y : tile.y + TILE, tile.x : tile.x + TILE]
        # no digit reaches the first two rows but by a pixel
        colour = np.median(its[:2].reshape(-1, 3), axis=0)
        assert np.abs(colour - COLOURS[tile.colour]).max() <= 12 + 10
        ink = np.abs(its - colour).sum(2) > 150
        offsets = [(down, right) for down in (1, 2, 3) for right in (3, 4, 5)]
        shown = [
            (ink[down : down + 14, right : right + 10] == (np.asarray(mask) > 0)).mean()
            for mask in MASKS
            for down, right in offsets
        ]
        assert np.argmax(shown) // len(offsets) == tile.digit
