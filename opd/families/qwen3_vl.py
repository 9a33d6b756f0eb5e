"""Qwen3-VL: visual tokens in a grid of merged patches, three-axis rotary positions (mRoPE).

The processor stretches the whole image to multiples of patch size * merge size, so the grid tiles the image evenly.
Source: `Qwen3VLModel.get_rope_index` and `Qwen2VLImageProcessor` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.types import FloatArray, IntArray


class Qwen3VL:
    """See `opd.families.Family`."""

    model_types = ("qwen3_vl",)
    image_token = "<|image_pad|>"
    banned = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")

    def sizes(self, processor: Any, min_pixels: int | None, max_pixels: int | None) -> dict[str, Any]:
        """Bounds on width * height after resizing; the processor calls them edges but compares areas."""
        size = {"shortest_edge": processor.size["shortest_edge"], "longest_edge": processor.size["longest_edge"]}
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
            # Only where the caller did not set it: a limit below the model's own minimum must still hold.
            size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        if min_pixels is not None:
            size["shortest_edge"] = min_pixels
            size["longest_edge"] = max(size["longest_edge"], min_pixels)
        return {"size": size}

    def grids(self, images: Mapping[str, NDArray[np.generic]], processor: Any) -> list[tuple[int, int]]:
        """Patches, merged merge_size by merge_size; the time axis of an image is 1."""
        merge = processor.merge_size
        return [(int(rows) // merge, int(columns) // merge) for _, rows, columns in images["image_grid_thw"]]

    def positions(self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]) -> IntArray:
        """int32 [3, P]: text counts up on all axes; an image stands at one time, and takes max(rows, columns) positions."""
        parts: list[NDArray[np.int64]] = []
        place, end = 0, 0
        remaining = np.asarray(tokens) == image_token
        for rows, columns in grids:
            begin = end + int(remaining[end:].argmax())
            parts.append(np.tile(place + np.arange(begin - end), (3, 1)))
            place += begin - end
            row, column = np.divmod(np.arange(rows * columns), columns)
            parts.append(place + np.stack([np.zeros_like(row), row, column]))
            place += max(rows, columns)
            end = begin + rows * columns
        parts.append(np.tile(place + np.arange(len(tokens) - end), (3, 1)))
        return np.concatenate(parts, axis=1).astype(np.int32)

    def boxes(self, grid: tuple[int, int], width: int, height: int) -> FloatArray:
        """Even tiles in reading order."""
        rows, columns = grid
        row, column = np.divmod(np.arange(rows * columns), columns)
        return np.stack(
            [column * width / columns, row * height / rows, (column + 1) * width / columns, (row + 1) * height / rows], axis=1
        ).astype(np.float32)
