"""Idefics3 and SmolVLM: an image is cut into square tiles, and the whole image follows, scaled down
to one tile.

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
    """Idefics3 and SmolVLM. The token `around` stands before every tile and at the end of an image;
    `whole` stands before the tile of the whole image."""

    model_types = ("idefics3", "smolvlm")
    around: str = "<fake_token_around_image>"
    image_token: str = "<image>"
    whole: str = "<global-img>"

    @property
    def placeholder(self) -> str:
        """The image token: the chat template writes it in the place of an image."""
        return self.image_token

    @property
    def banned(self) -> tuple[str, ...]:
        """The special tokens of an image, except those of rows and columns."""
        return self.around, self.image_token, self.whole

    def named(self, tokenizer: Any) -> Idefics3:
        """The same family with the tokens that `SmolVLMProcessor` takes from the tokenizer, else
        the usual tokens, as `Idefics3Processor` has."""
        names = ("fake_image_token", "image_token", "global_image_token")
        return Idefics3(*(token(tokenizer, *pair) for pair in zip(names, self.banned, strict=True)))

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """Sets `longest_edge`. The processor scales the longer edge to it and rounds both edges up
        to whole tiles, so an image has at most longest_edge^2 pixels."""
        if min_pixels is not None:
            raise ModelError(
                "idefics3 has no lower bound on an image's pixels: it brings every image to one"
                " size; leave min_pixels at 0"
            )
        if max_pixels is None:
            return {}
        tile = int(processor.max_image_size["longest_edge"])
        edge = max(1, isqrt(max_pixels) // tile) * tile
        return {"size": {"longest_edge": min(int(processor.size["longest_edge"]), edge)}}

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """Number of pixels in a square whose side is the longest edge."""
        return int({**processor.size, **sizes.get("size", {})}["longest_edge"]) ** 2

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Raises ModelError if the processor's tiles or number of tokens are not the vision
        tower's."""
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
        """`pixel_values` [tiles, 3, H, W] of all images in order, `pixel_attention_mask` [tiles, H,
        W], and a layout for each image."""
        made = processor(
            images=[list(images)], return_tensors="np", return_row_col_info=True, **sizes
        )
        side = _side(config)
        arrays = {name: plain(made[name][0]) for name in ("pixel_values", "pixel_attention_mask")}
        layouts = [
            self._layout(int(rows), int(columns), side)
            for rows, columns in zip(made["rows"][0], made["cols"][0], strict=True)
        ]
        return arrays, layouts

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """A layout for each image, with the tiles that the processor cuts."""
        side = _side(config)
        tiles = [
            processor.get_number_of_image_patches(height, width, dict(sizes))
            for width, height in images
        ]
        return [self._layout(rows, columns, side) for _, rows, columns in tiles]

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """Consecutive positions, int32 [1, P]."""
        return counted(tokens)

    def _layout(self, rows: int, columns: int, side: int) -> Layout:
        """The layout of an image cut into `rows` x `columns` tiles: a line for each row of tiles,
        then the whole image. 0 x 0: the whole image alone. `side`: visual tokens along a tile's
        side."""
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
    """Number of visual tokens along a side of a tile."""
    vision = config["vision_config"]
    return (
        int(vision["image_size"]) // int(vision["patch_size"]) // int(config.get("scale_factor", 2))
    )
