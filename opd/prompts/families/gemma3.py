"""Gemma 3: every image is stretched to one square and becomes a fixed number of visual tokens,
which attend to each other in both directions.

Pan and scan, which adds crops of an image to the prompt, is off, as in the published processors.
Source: `Gemma3Processor` and `Gemma3ImageProcessor` of transformers 5.
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
from opd.models.consistency import check_channels, check_equal, check_switch, edges
from opd.prompts.families.layout import Layout, Tile, counted, plain, token
from opd.types import IntArray


@dataclass(frozen=True)
class Gemma3:
    """Gemma 3: every image becomes a square of the same size."""

    model_types = ("gemma3",)
    placeholder: str = "<start_of_image>"
    end: str = "<end_of_image>"
    image_token: str = "<image_soft_token>"

    @property
    def banned(self) -> tuple[str, ...]:
        """The three special tokens of an image."""
        return self.placeholder, self.end, self.image_token

    def named(self, tokenizer: Any) -> Gemma3:
        """The same family with the tokens that `Gemma3Processor` takes from the tokenizer."""
        names = ("boi_token", "eoi_token", "image_token")
        return Gemma3(*(token(tokenizer, *pair) for pair in zip(names, self.banned, strict=True)))

    def sizes(
        self, processor: Any, min_pixels: int | None, max_pixels: int | None
    ) -> dict[str, Any]:
        """No options, since the size is fixed. Raises ModelError for a bound that the fixed size
        does not keep."""
        size, pixels = processor.size, self.most_pixels(processor, {})
        if (min_pixels is not None and min_pixels > pixels) or (
            max_pixels is not None and max_pixels < pixels
        ):
            raise ModelError(
                f"gemma3 sees every image at {size['width']} x {size['height']} pixels; leave"
                " min_pixels and max_pixels at 0"
            )
        return {}

    def most_pixels(self, processor: Any, sizes: Mapping[str, Any]) -> int:
        """Number of pixels in the square."""
        return int(processor.size["height"]) * int(processor.size["width"])

    def check(
        self, processor: Any, settings: Mapping[str, Any], config: Mapping[str, Any], file: Path
    ) -> None:
        """Raises ModelError if the processor's square or number of tokens is not the vision
        tower's."""
        vision, tokens = config["vision_config"], config["mm_tokens_per_image"]
        size = edges(processor.size)
        for side in ("height", "width"):
            check_equal(
                file,
                f"size.{side}",
                size.get(side),
                "vision_config.image_size",
                vision["image_size"],
            )
        check_channels(file, processor, vision["num_channels"])
        check_switch(file, processor, "do_resize", True)
        # Pan and scan would add crops and a text to the prompt.
        check_switch(file, processor, "do_pan_and_scan", False)
        if "image_seq_length" in settings:
            check_equal(
                file.with_name("processor_config.json"),
                "image_seq_length",
                settings["image_seq_length"],
                "mm_tokens_per_image",
                tokens,
            )

    def lay_out(
        self,
        processor: Any,
        images: Sequence[Image],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> tuple[dict[str, NDArray[np.generic]], list[Layout]]:
        """`pixel_values` [images, 3, H, W], and a layout for each image."""
        made = processor(images=list(images), return_tensors="np", do_pan_and_scan=False, **sizes)
        layouts = self.layouts(processor, [image.size for image in images], sizes, config)
        return {"pixel_values": plain(made["pixel_values"])}, layouts

    def layouts(
        self,
        processor: Any,
        images: Sequence[tuple[int, int]],
        sizes: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> list[Layout]:
        """The same layout for every image: one tile, between blank lines."""
        side = isqrt(int(config.get("mm_tokens_per_image", 256)))
        layout = Layout(
            f"\n\n{self.placeholder}{self.image_token}{self.end}\n\n", (Tile((side, side)),)
        )
        return [layout] * len(images)

    def positions(
        self, tokens: IntArray, image_token: int, grids: Sequence[tuple[int, int]]
    ) -> IntArray:
        """Consecutive positions, int32 [1, P]."""
        return counted(tokens)
