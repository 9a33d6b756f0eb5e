"""Finds the window of a picture in which a map over visual tokens is highest.

Legend: S visual tokens of one image, R rows and C columns of the map's cells.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from opd.types import Box, FloatArray
from opd.views.piece import Size

SIDES = (1 / 8, 1 / 6, 1 / 4, 1 / 3, 1 / 2)
"""Sides of the windows, as shares of the picture's longer side."""

SMALLEST = 2
"""Fewest cells of a window's side, since evidence seldom lies in one cell alone."""

Map = NDArray[np.float64]


@dataclass(frozen=True)
class Window:
    """The best window: its `box`; `inside`, the share of the map's excess that lies in the window;
    `area`, the window's share of the picture, both in 0..1; and `excess`, the mean over its cells,
    by which windows of several pictures are compared."""

    box: Box
    inside: float
    area: float
    excess: float


def to_map(boxes: FloatArray, values: Map, size: Size) -> Map:
    """The map [R, C] of `values` [S] over a picture of `size` (width, height). `boxes` [S, 4]: the
    rectangle of each visual token in pixels.

    A cell is as large as the smallest visual token, and has the mean of the values of all tokens
    that cover its centre, since some encoders see a picture both in tiles and as a whole.
    """
    width, height = size
    columns = max(1, round(width / float((boxes[:, 2] - boxes[:, 0]).min())))
    rows = max(1, round(height / float((boxes[:, 3] - boxes[:, 1]).min())))
    across = (np.arange(columns) + 0.5) * width / columns
    down = (np.arange(rows) + 0.5) * height / rows
    in_column = (boxes[:, :1] <= across) & (across < boxes[:, 2:3])
    in_row = (boxes[:, 1:2] <= down) & (down < boxes[:, 3:])
    covering = in_row.T.astype(np.float64) @ in_column
    total = (in_row * values[:, None]).T @ in_column
    return np.asarray(total / np.maximum(covering, 1))


def best_window(
    cells: Map, size: Size, image: int = 0, sides: Sequence[float] = SIDES
) -> Window | None:
    """The best window over several sizes in the map [R, C] of a picture of `size`; None if the map
    is flat, or if no window is smaller than the picture.

    Only the excess counts, the part of a cell above the map's mean. Of each size the window with
    the most excess is taken, as in ViCrop (arXiv 2502.17422), and of these the one whose share of
    the excess is most above what its area would get by chance, in standard deviations:
    (inside - area) / sqrt(area * (1 - area)). The box is moved to the centroid of the excess in the
    window, since that is finer than a cell, and stays inside the picture.
    """
    excess = np.maximum(cells - cells.mean(), 0)
    total = float(excess.sum())
    if not np.isfinite(total) or total <= 1e-9 * float(np.abs(cells).sum()):
        return None
    rows, columns = cells.shape
    sums = np.pad(excess.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    cell = size[0] / columns, size[1] / rows
    best, highest = None, 0.0
    for side in sides:
        across, down = (
            min(most, max(SMALLEST, round(side * max(size) / edge)))
            for most, edge in ((columns, cell[0]), (rows, cell[1]))
        )
        area = across * down / cells.size
        if area == 1:
            continue
        inside = (
            sums[down:, across:]
            - sums[:-down, across:]
            - sums[down:, :-across]
            + sums[:-down, :-across]
        )
        top, left = np.unravel_index(inside.argmax(), inside.shape)
        share = float(inside[top, left]) / total
        score = (share - area) / float(np.sqrt(area * (1 - area)))
        if score > highest:
            region = slice(int(top), int(top) + down), slice(int(left), int(left) + across)
            box = _centred(excess, region, cell, size, image)
            highest = score
            best = Window(box, min(1.0, share), area, float(excess[region].mean()))
    return best


def _centred(
    excess: Map, region: tuple[slice, slice], cell: tuple[float, float], size: Size, image: int
) -> Box:
    """The box as large as `region` (rows, columns) about the centroid of the excess in it."""
    weights = excess[region]
    starts = []
    for axis, (along, edge, length) in enumerate(zip(region[::-1], cell, size, strict=True)):
        places = (np.arange(along.start, along.stop) + 0.5) * edge
        centre = float((weights.sum(axis) * places).sum() / weights.sum())
        extent = (along.stop - along.start) * edge
        starts.append((max(0.0, min(centre - extent / 2, length - extent)), extent))
    (x, across), (y, down) = starts
    return Box(x, y, min(size[0], x + across), min(size[1], y + down), image)
