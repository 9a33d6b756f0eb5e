"""Qwen2.5-VL, Qwen3-VL and Qwen3.5: an image becomes one grid of merged patches, with rotary
positions on three axes (mRoPE).

The processor stretches the image to multiples of patch size * merge size, so the grid covers it
evenly. Source: `get_rope_index` of each model and `Qwen2VLImageProcessor` of transformers 5.
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
    """Qwen2.5-VL, Qwen3-VL and Qwen3.5: images of any size, one tile each."""

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
        """The image token: the chat template writes it in the place of an image."""
        return self.image_token

    def named(self, tokenizer: Any) -> QwenVL:
        """The same family with the tokens that `Qwen3VLProcessor` takes from the tokenizer."""
        names = ("vision_start_token", "vision_end_token", "image_token", "video_token")
        tokens = tuple(token(tokenizer, *pair) for pair in zip(names, self.banned, strict=True))
        return QwenVL(tokens[2], tokens)

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """Sets the processor's bounds on width * height, which it calls edges although it compares
        areas."""
        size = {
            "shortest_edge": processor.size["shortest_edge"],
            "longest_edge": processor.size["longest_edge"],
        }
        if max_pixels is not None:
            size["longest_edge"] = max_pixels
            # A max_pixels below the model's own lower bound has to lower that bound too.
            size["shortest_edge"] = min(size["shortest_edge"], max_pixels)
        if min_pixels is not None:
            size["shortest_edge"] = min_pixels
            size["longest_edge"] = max(size["longest_edge"], min_pixels)
        return {"size": size}

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """The upper bound on an image's pixels, which the processor calls `longest_edge`."""
        return int(sizes["size"]["longest_edge"])

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Raises ModelError if patch size, merge size or frames are not the vision tower's, or the
        bounds on pixels are unusable."""
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
        """`pixel_values` [patches, values] of all images in order, `image_grid_thw` [images, 3] in
        patches, and a layout for each image, whose grid counts squares of merge_size x merge_size
        patches."""
        if _is_plain(processor):
            made = _patches(processor, images, sizes["size"])
        else:
            made = processor(images=list(images), return_tensors="np", **sizes)
        merge = processor.merge_size
        grids = [
            (int(rows) // merge, int(columns) // merge)
            for _, rows, columns in made["image_grid_thw"]
        ]
        arrays = {name: plain(made[name]) for name in ("pixel_values", "image_grid_thw")}
        return arrays, [Layout(self.placeholder, (Tile(grid),)) for grid in grids]

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """A layout of one tile for each image, with a visual token for each square of merged
        patches."""
        side = processor.patch_size * processor.merge_size
        layouts = []
        for width, height in images:
            if processor.do_resize:
                height, width = _resized(processor, (width, height), sizes["size"])
            layouts.append(Layout(self.placeholder, (Tile((height // side, width // side)),)))
        return layouts

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """int32 [3, P], the axes time, height and width. Text counts up on all axes; an image has
        one time, and the text after it continues max(rows, columns) later."""
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
    """Whether the processor does exactly what `_patches` does."""
    steps = (
        processor.do_resize,
        processor.do_rescale,
        processor.do_normalize,
        processor.do_convert_rgb,
    )
    return type(processor).__name__ == "Qwen2VLImageProcessorPil" and all(steps)


def _resized(processor: Any, image: tuple[int, int], size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) to which the processor resizes an image of this (width, height)."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    width, height = image
    side = processor.patch_size * processor.merge_size
    resized: tuple[int, int] = smart_resize(
        height, width, side, size["shortest_edge"], size["longest_edge"]
    )
    return resized


def _patches(
    processor: Any, images: Sequence[Image], size: Mapping[str, int]
) -> dict[str, NDArray[np.generic]]:
    """The processor's arrays, equal to the bit, in a quarter of the time.

    A byte has one of 256 normalised values, so patches are cut from bytes and the values are looked
    up in a table. Every image is repeated in `temporal_patch_size` frames.
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
        for channel, normalised in enumerate(table):
            values[:, channel] = normalised.take(
                cut[..., channel, :, :].reshape(rows * columns, 1, side * side)
            )
        pixels.append(values.reshape(rows * columns, -1))
        grids.append([1, rows, columns])
    return {"pixel_values": np.concatenate(pixels), "image_grid_thw": np.array(grids)}


@lru_cache(maxsize=16)
def _table(factor: float, mean: tuple[float, ...], deviation: tuple[float, ...]) -> FloatArray:
    """Normalised values [channels, 256] of all bytes, by the processor's own arithmetic."""
    from transformers.image_transforms import normalize, rescale

    every = np.tile(np.arange(256, dtype=np.uint8), (len(mean), 1, 1))
    normalised: FloatArray = normalize(
        rescale(every, factor), mean, deviation, input_data_format="channels_first"
    )
    return normalised[:, 0]
