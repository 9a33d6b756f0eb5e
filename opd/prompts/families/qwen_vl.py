"""Qwen2.5-VL, Qwen3-VL and Qwen3.5: visual tokens in a grid of merged patches, three-axis rotary
positions (mRoPE).

The processor stretches the whole image to multiples of patch size * merge size, so the grid tiles
the image evenly. Source: `get_rope_index` of each model and `Qwen2VLImageProcessor` of transformers
5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from opd.models.consistency import ENLARGED, check_channels, check_edge, check_equal, edges
from opd.prompts.families.layout import Layout, Tile, plain, token
from opd.types import FloatArray, IntArray


@dataclass(frozen=True)
class QwenVL:
    """Images of any size, each one tile of packed patches."""

    model_types = ("qwen2_5_vl", "qwen3_vl", "qwen3_5")
    image_token: str = "<|image_pad|>"
    banned: tuple[str, ...] = (
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )

    @property
    def placeholder(self) -> str:
        """The template writes the token itself."""
        return self.image_token

    def named(self, tokenizer: Any) -> QwenVL:
        """As `Qwen3VLProcessor` takes tokens from its tokenizer."""
        names = ("vision_start_token", "vision_end_token", "image_token", "video_token")
        tokens = tuple(token(tokenizer, *pair) for pair in zip(names, self.banned, strict=True))
        return QwenVL(tokens[2], tokens)

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """Bounds on width * height after resizing; the processor calls them edges but compares
        areas."""
        size = {
            "shortest_edge": processor.size["shortest_edge"],
            "longest_edge": processor.size["longest_edge"],
        }
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
            # Only where the caller did not set it: a limit below the model's own minimum must still
            # hold.
            size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        if min_pixels is not None:
            size["shortest_edge"] = min_pixels
            size["longest_edge"] = max(size["longest_edge"], min_pixels)
        return {"size": size}

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """The bound on an image's pixels, `longest_edge`, which counts pixels there."""
        return int(sizes["size"]["longest_edge"])

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Patches, merges and frames are the tower's, and the bounds on pixels are some."""
        vision = config["vision_config"]
        for key, name in (
            ("patch_size",) * 2,
            ("merge_size", "spatial_merge_size"),
            ("temporal_patch_size",) * 2,
        ):
            check_equal(file, key, getattr(processor, key), f"vision_config.{name}", vision[name])
        check_channels(file, processor, vision["in_channels"])
        size = edges(processor.size)
        check_edge(file, "size.longest_edge", size.get("longest_edge"), 2**40)
        check_edge(
            file,
            "size.shortest_edge",
            size.get("shortest_edge"),
            min(ENLARGED, size["longest_edge"]),
        )

    def lay_out(
        self,
        processor: Any,
        images: Sequence[Image],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        """Patches of all images in one array, and their grids; merge_size by merge_size patches
        make a visual token."""
        if _is_plain(processor):
            found = _patches(processor, images, sizes["size"])
        else:
            found = processor(images=list(images), return_tensors="np", **sizes)
        merge = processor.merge_size
        grids = [
            (int(rows) // merge, int(columns) // merge)
            for _, rows, columns in found["image_grid_thw"]
        ]
        arrays = {name: plain(found[name]) for name in ("pixel_values", "image_grid_thw")}
        return arrays, [Layout(self.placeholder, (Tile(grid),)) for grid in grids]

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """One tile for each image: a token for each merged square of patches."""
        side = processor.patch_size * processor.merge_size
        found = []
        for width, height in images:
            if processor.do_resize:
                height, width = _resized(processor, (width, height), sizes["size"])
            found.append(Layout(self.placeholder, (Tile((height // side, width // side)),)))
        return found

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """int32 [3, P]: text counts up on all axes; an image stands at one time, and takes
        max(rows, columns) positions."""
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


def _is_plain(processor: Any) -> bool:
    """Whether a processor does what `_patches` does, and nothing else."""
    steps = (
        processor.do_resize,
        processor.do_rescale,
        processor.do_normalize,
        processor.do_convert_rgb,
    )
    return type(processor).__name__ == "Qwen2VLImageProcessorPil" and all(steps)


def _resized(processor: Any, image: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """Height and width to which the processor brings an image of this (width, height)."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = image
    side = processor.patch_size * processor.merge_size
    found: tuple[int, int] = smart_resize(
        height, width, side, size["shortest_edge"], size["longest_edge"]
    )
    return found


def _patches(
    processor: Any, images: Sequence[Image], size: Mapping[str, int]
) -> dict[str, NDArray[np.generic]]:
    """What the processor gives, to the bit, in a quarter of its time.

    An eight-bit value has one of 256 results, so patches are cut from bytes and looked up; and
    every image stands in `temporal_patch_size` frames, all alike.
    """
    side, merge, frames = processor.patch_size, processor.merge_size, processor.temporal_patch_size
    table = _table(
        float(processor.rescale_factor), tuple(processor.image_mean), tuple(processor.image_std)
    )
    pixels, grids = [], []
    for image in images:
        height, width = _resized(processor, image.size, size)
        if (width, height) != image.size:
            image = image.resize((width, height), processor.resample)
        rows, columns = height // side, width // side
        cut = (
            np.asarray(image)
            .reshape(rows // merge, merge, side, columns // merge, merge, side, -1)
            .transpose(0, 3, 1, 4, 6, 2, 5)
        )
        values = np.empty((rows * columns, cut.shape[4], frames, side * side), np.float32)
        for channel, its in enumerate(table):
            values[:, channel] = its.take(
                cut[..., channel, :, :].reshape(rows * columns, 1, side * side)
            )
        pixels.append(values.reshape(rows * columns, -1))
        grids.append([1, rows, columns])
    return {"pixel_values": np.concatenate(pixels), "image_grid_thw": np.array(grids)}


@lru_cache(maxsize=16)
def _table(factor: float, mean: tuple[float, ...], deviation: tuple[float, ...]) -> FloatArray:
    """Values [channels, 256] of all bytes, by the processor's own arithmetic."""
    from transformers.image_transforms import normalize, rescale

    every = np.tile(np.arange(256, dtype=np.uint8), (len(mean), 1, 1))
    found: FloatArray = normalize(
        rescale(every, factor), mean, deviation, input_data_format="channels_first"
    )
    return found[:, 0]
