"""Idefics3 and SmolVLM: an image is cut into square tiles, and stands once more as a whole after
them.

Source: `Idefics3Processor` and `Idefics3ImageProcessor` of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from opd.errors import ModelError
from opd.models.consistency import check_channels, check_edge, check_equal, check_switch, edges
from opd.prompts.families.layout import Layout, Tile, counted, plain, token
from opd.types import IntArray


@dataclass(frozen=True)
class Idefics3:
    """Large images are cut into tiles, and the whole image follows them small. `around` and `whole`
    stand about an image and before its last tile."""

    model_types = ("idefics3", "smolvlm")
    around: str = "<fake_token_around_image>"
    image_token: str = "<image>"
    whole: str = "<global-img>"

    @property
    def placeholder(self) -> str:
        """The template writes the token itself."""
        return self.image_token

    @property
    def banned(self) -> tuple[str, ...]:
        """The tokens about an image; those of rows and columns are left to the model."""
        return self.around, self.image_token, self.whole

    def named(self, tokenizer: Any) -> Idefics3:
        """As `SmolVLMProcessor` takes tokens from its tokenizer; `Idefics3Processor` has the usual
        ones."""
        names = ("fake_image_token", "image_token", "global_image_token")
        return Idefics3(*(token(tokenizer, *pair) for pair in zip(names, self.banned, strict=True)))

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """The longer edge is brought to `longest_edge` and both are rounded up to whole tiles: at
        most longest_edge^2 pixels remain."""
        if min_pixels is not None:
            raise ModelError(
                "idefics3 has no lower bound on an image's pixels: it brings every image to one"
                " size; leave min_pixels at 0"
            )
        if max_pixels is None:
            return {}
        tile = int(processor.max_image_size["longest_edge"])
        return {
            "size": {
                "longest_edge": min(
                    int(processor.size["longest_edge"]), max(1, isqrt(max_pixels) // tile) * tile
                )
            }
        }

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """The pixels of a square of the longest edge, to which images are brought before they are
        cut."""
        return int({**processor.size, **sizes.get("size", {})}["longest_edge"]) ** 2

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Tiles are as large as the tower's images, and both count the same tokens."""
        vision, tile = config["vision_config"], edges(processor.max_image_size).get("longest_edge")
        check_equal(
            file,
            "max_image_size.longest_edge",
            tile,
            "vision_config.image_size",
            vision["image_size"],
        )
        check_edge(file, "size.longest_edge", edges(processor.size).get("longest_edge"), 2**14)
        check_channels(file, processor, vision["num_channels"])
        check_switch(file, processor, "do_resize", True)
        if "image_seq_len" in settings:
            tokens = (vision["image_size"] // vision["patch_size"] // config["scale_factor"]) ** 2
            name = "(vision_config.image_size / patch_size / scale_factor)^2"
            check_equal(
                file.with_name("processor_config.json"),
                "image_seq_len",
                settings["image_seq_len"],
                name,
                tokens,
            )

    def lay_out(
        self,
        processor: Any,
        images: Sequence[Image],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        """Pixels [tiles, 3, H, W] of all images one after the other, and their masks [tiles, H,
        W]."""
        found = processor(
            images=[list(images)], return_tensors="np", return_row_col_info=True, **sizes
        )
        side = _side(config)
        arrays = {name: plain(found[name][0]) for name in ("pixel_values", "pixel_attention_mask")}
        return arrays, [
            self._layout(int(rows), int(columns), side)
            for rows, columns in zip(found["rows"][0], found["cols"][0], strict=True)
        ]

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """The tiles of each image, as the processor cuts it."""
        side = _side(config)
        tiles = [
            processor.get_number_of_image_patches(height, width, dict(sizes))
            for width, height in images
        ]
        return [self._layout(rows, columns, side) for _, rows, columns in tiles]

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """int32 [1, P]: one after the other."""
        return counted(tokens)

    def _layout(self, rows: int, columns: int, side: int) -> Layout:
        """`rows` x `columns` tiles, each row of them on a line, then the whole image; an image of
        one tile is the whole image alone."""
        lines = [
            [
                f"{self.around}<row_{row + 1}_col_{column + 1}>{self.image_token}"
                for column in range(columns)
            ]
            for row in range(rows)
        ]
        text = (
            "".join("".join(line) + "\n" for line in lines)
            + ("\n" if rows else "")
            + f"{self.around}{self.whole}{self.image_token}{self.around}"
        )
        tiles = [
            Tile(
                (side, side),
                (column / columns, row / rows, (column + 1) / columns, (row + 1) / rows),
            )
            for row in range(rows)
            for column in range(columns)
        ]
        return Layout(text, (*tiles, Tile((side, side))))


def _side(config: Mapping[str, Any]) -> int:
    """Visual tokens along a side of a tile."""
    vision = config["vision_config"]
    return (
        int(vision["image_size"]) // int(vision["patch_size"]) // int(config.get("scale_factor", 2))
    )
