"""Image files as the models see them: upright, RGB, eight bits.

Boxes and crops are always in pixels of the upright image, which is what every viewer and annotation tool shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from opd.errors import DataError


def open_image(source: Path | Image.Image) -> Image.Image:
    """Decodes a file (the first frame of an animation), or takes an image in memory, and makes it upright and RGB.

    Raises DataError with the path where the file is missing, damaged, truncated, no image, or so large that Pillow calls it a
    decompression bomb (above 2 * `PIL.Image.MAX_IMAGE_PIXELS`).
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    if not source.is_file():
        raise DataError(f"image not found: {source}")
    try:
        with Image.open(source) as image:
            return upright_rgb(image)
    except DataError as error:
        raise DataError(f"{source}: {error}") from error
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, EOFError, struct.error, DecompressionBombError ...
        raise DataError(f"image cannot be read: {source}: {_reason(error)}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, lays transparent pixels on white, and converts every mode to RGB.

    Sixteen bits are scaled to eight (Pillow alone would clip them). Raises DataError for pixels whose range is not known: floats and
    integers above 65,535.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "F":
        raise DataError("floating-point pixels have no agreed range; save the image with 8 or 16 bits")
    if image.mode.startswith("I"):
        return _eight_bits(image).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise DataError("integer pixels outside 0..65535 have no agreed range; save the image with 8 or 16 bits")
    # 65,535 = 255 * 257, so this rounds to the nearest.
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    """Pillow's reason in one line, without the path that the caller names anyway."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or of an unknown format"
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
