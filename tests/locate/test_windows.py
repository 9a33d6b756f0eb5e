"""The best window of a map, with maps whose peak is planted."""

from __future__ import annotations

import numpy as np
import pytest

from opd.locate.windows import best_window, to_map


def grid(columns, rows, size, region=(0, 0, 1, 1)):
    left, top, right, bottom = np.array(region) * (*size, *size)
    row, column = np.divmod(np.arange(columns * rows), columns)
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    return np.stack([x[column], y[row], x[column + 1], y[row + 1]], 1).astype(np.float32)


def corners(window):
    return window.box.x0, window.box.y0, window.box.x1, window.box.y1


def test_a_grid_is_its_own_map():
    values = np.random.default_rng(0).random(12)
    assert np.array_equal(to_map(grid(4, 3, (70, 50)), values, (70, 50)), values.reshape(3, 4))


def test_tiles_and_the_whole_picture_are_averaged():
    """As Idefics3 sees a picture: two tiles of 2 x 2, and the whole in 2 x 1."""
    size = (80, 40)
    boxes = np.concatenate(
        [grid(2, 2, size, (0, 0, 0.5, 1)), grid(2, 2, size, (0.5, 0, 1, 1)), grid(2, 1, size)]
    )
    values = np.array([1, 2, 3, 4, 5, 6, 7, 8, 10, 20], float)
    wanted = [[5.5, 6, 12.5, 13], [6.5, 7, 13.5, 14]]
    np.testing.assert_allclose(to_map(boxes, values, size), wanted)


def test_the_window_is_about_the_peak():
    cells = np.ones((8, 8))
    cells[2, 5] = 9
    window = best_window(cells, (128, 128), image=1)
    assert corners(window) == (72, 24, 104, 56)  # 2 x 2 cells about the centre of the cell
    assert (window.box.image, window.inside, window.area) == (1, 1.0, 4 / 64)


def test_a_window_stays_inside_the_picture():
    cells = np.ones((8, 8))
    cells[0, 7] = 9
    assert corners(best_window(cells, (128, 64))) == (96, 0, 128, 16)


def test_of_several_sizes_the_one_that_fits():
    """A wide peak takes a large window, and its window holds all of it."""
    for side in (2, 3, 4):
        cells = np.ones((8, 8))
        cells[1 : 1 + side, 3 : 3 + side] = 5
        window = best_window(cells, (128, 128))
        assert corners(window) == (48, 16, 48 + 16 * side, 16 + 16 * side)
        assert window.inside == pytest.approx(1)


def test_a_large_window_does_not_win_by_its_area():
    cells = np.random.default_rng(0).random((8, 8))
    cells[2:4, 5:7] = 5
    window = best_window(cells, (128, 128))
    assert corners(window) == pytest.approx((80, 32, 112, 64))
    assert window.area == 4 / 64


def test_weights_move_the_box_between_cells():
    cells = np.ones((8, 8))
    cells[4, 4], cells[4, 5] = 5, 5
    assert corners(best_window(cells, (128, 128)))[0] == 64
    cells[4, 5] = 3  # excess 4 and 2, but for the mean
    assert 64 > corners(best_window(cells, (128, 128)))[0] > 56


@pytest.mark.parametrize(
    "cells",
    [
        np.ones((8, 8)),
        np.zeros((8, 8)),
        np.full((5, 5), np.nan),
        np.ones((1, 1)),
        np.arange(4.0).reshape(2, 2),
    ],
)
def test_nothing_is_found_in_a_flat_map(cells):
    """Nor in one that is not finite, or of which every window is the whole."""
    assert best_window(cells, (64, 64)) is None


def test_the_confidence_of_noise_is_low():
    rng = np.random.default_rng(0)
    noise = [best_window(rng.random((16, 16)), (256, 256)) for _ in range(20)]
    assert max(one.inside - one.area for one in noise) < 0.2
