"""Opens pictures as the models see them: upright, RGB, eight bits.

Boxes and crops are in pixels of the upright image, as viewers and annotation tools show it.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from opd.data.image_formats import HEAD, load_plugin, named
from opd.errors import DataError, one_line, shortened
from opd.types import MAX_IMAGE_PIXELS, EncodedImage, ImageSource, Picture

DEPTHS = (8, 10, 12, 14, 16)
"""Depths in bits of the values in a 16-bit image: cameras and scanners store 10, 12 or 14 bits in
16."""

SWAPPED = 5
"""EXIF orientations from this number on swap width and height."""

PILLOW = r"PIL\."
"""Matches the modules of Pillow, whose warnings are not shown."""

_OPENING = threading.Lock()


def open_image(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """The image of a file (the first frame of an animation), of a `Picture`, or in memory, upright
    and RGB.

    Raises DataError, which names the path, if the picture is missing, damaged, truncated, not an
    image, or has more than `max_pixels` pixels.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(source)
    with opened(source, max_pixels) as image:
        return upright_rgb(image)


@contextmanager
def opened(source: EncodedImage, max_pixels: int = MAX_IMAGE_PIXELS) -> Iterator[Image.Image]:
    """Opens a picture and reads the header, without decoding pixels. Errors, also those inside the
    block, become a DataError of one line.

    A MemoryError for an image within `max_pixels` is passed on, since it is not a fault of the
    image.
    """
    _silence()
    within = False
    content = _content(source)
    try:
        with _open(content) as image:
            if image.format == "EPS":
                # Pillow would run Ghostscript if it is installed.
                raise DataError("an EPS drawing is a program, which is never run; save it as PNG")
            check_size(image.size, max_pixels)
            within = True
            yield image
    except DataError as error:
        raise DataError(f"{short(source)}: {error}") from error
    except Exception as error:
        # Damaged files raise OSError, SyntaxError, ValueError, EOFError, struct.error, MemoryError
        # and others.
        if within and isinstance(error, MemoryError):  # the machine has no memory left
            raise
        raise DataError(f"image cannot be read: {short(source)}: {_reason(error)}") from error


def image_size(source: ImageSource, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int]:
    """The upright (width, height) in pixels of an image, from the header of a picture alone. Raises
    DataError as `open_image` does, except for faults of the pixels."""

    def upright(image: Image.Image) -> tuple[int, int]:
        width, height = image.size
        return (height, width) if orientation(image) >= SWAPPED else (width, height)

    if isinstance(source, Image.Image):
        return upright(source)
    with opened(source, max_pixels) as image:
        return upright(image)


def check_size(size: tuple[int, int], max_pixels: int) -> None:
    """Raises DataError for an image of this (width, height) with more than `max_pixels` pixels."""
    width, height = size
    if width * height > max_pixels:
        raise DataError(
            f"{width} x {height} = {width * height} pixels, above data.max_image_pixels ="
            f" {max_pixels}; raise it for pictures that you trust"
        )


def measured(image: Image.Image) -> tuple[tuple[int, int], int]:
    """Decodes an opened picture. Returns the upright (width, height), and the depth in bits.

    The depth is one of DEPTHS for a 16-bit image, and 8 for any other. Raises DataError for pixels
    that `upright_rgb` refuses.
    """
    bits = _decode(image)
    width, height = image.size
    swapped = orientation(image) >= SWAPPED
    return (height, width) if swapped else (width, height), bits


def upright_rgb(image: Image.Image) -> Image.Image:
    """Applies the EXIF orientation, puts transparent images on white, and converts every mode to
    RGB.

    Sixteen bits are scaled to eight. If the largest value of a 16-bit image is at most 255, 1,023,
    4,095 or 16,383, the values are taken as 8, 10, 12 or 14 bits, since the image would be dark
    otherwise. Raises DataError for pixels of unknown range: floats, and integers outside 0..65535.
    """
    _decode(image)
    if orientation(image) != 1:  # `exif_transpose` would copy the pixels of an upright image too
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode.startswith("I"):
        return _eight_bits(np.asarray(image)).convert("RGB")
    if image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        return canvas.convert("RGB")
    return image.convert("RGB")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1..8; 1, which is upright, if there is none."""
    value = image.getexif().get(0x0112, 1)
    return value if isinstance(value, int) and 2 <= value <= 8 else 1


def short(source: EncodedImage | str) -> str:
    """The path or name of a picture for a message, in one line; a long one loses its middle."""
    shown = source.name if isinstance(source, Picture) else str(source)
    shown = shown if len(shown) <= 300 else f"{shown[:120]}...{shown[-120:]}"
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in shown)


def _content(source: EncodedImage) -> Path | BytesIO:
    """The content of a picture. Raises DataError, which names the picture."""
    if isinstance(source, Picture):
        return BytesIO(source.read())
    try:
        exists = source.is_file()
    except OSError as error:
        raise DataError(f"image cannot be read: {short(source)}: {_reason(error)}") from error
    if not exists:
        raise DataError(f"image not found: {short(source)}")
    return source


def _open(content: Path | BytesIO) -> Image.Image:
    """Opens a picture with Pillow or a plugin, without Pillow's own bound on pixels."""
    try:
        return Image.open(content)
    except Image.DecompressionBombError:
        # The caller checks the size, so Pillow's own bound is lifted while the header is read.
        with _OPENING:
            bound, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(content)
            finally:
                Image.MAX_IMAGE_PIXELS = bound
    except UnidentifiedImageError:
        head = _head(content)
        if load_plugin(head):
            with suppress(UnidentifiedImageError):
                return Image.open(content)
        raise UnidentifiedImageError(named(head)) from None


def _head(content: Path | BytesIO) -> bytes:
    """The first HEAD bytes of a picture."""
    if isinstance(content, BytesIO):
        return content.getvalue()[:HEAD]
    with content.open("rb") as file:
        return file.read(HEAD)


def _decode(image: Image.Image) -> int:
    """Decodes the pixels. Returns the depth in bits: one of DEPTHS for a 16-bit image, 8 for any
    other. Raises DataError for pixels of unknown range."""
    modes = _raw_modes(image)
    file: Any = getattr(image, "fp", None)  # Pillow forgets it while it decodes
    image.load()
    if image.mode == "F":
        raise DataError(
            "floating-point pixels have no agreed range; save the image with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(
                "integer pixels outside 0..65535 have no agreed range; save the image with 8 or 16"
                " bits"
            )
        return _depth(values)
    if not isinstance(image, ImageFile.ImageFile) or not any(";16" in mode for mode in modes):
        return 8
    # Pillow keeps only the upper eight bits of a colour, which suffice unless all values are small.
    upper = np.asarray(image)
    colours = upper[..., :3] if image.mode.startswith("RGB") else upper[..., :1]
    if colours.max() >= 1 << (DEPTHS[-2] - 8):
        return 16
    return _stretch(image, upper, image.filename or file)


def _stretch(
    image: ImageFile.ImageFile, upper: NDArray[np.uint8], content: str | bytes | IO[bytes]
) -> int:
    """Scales the colours of a 16-bit image by the depth of its values, in place. `upper` holds the
    upper eight bits; `content` is the image's file, by name or open. Returns the depth in bits."""
    with Image.open(content) as reopened:
        modes = _raw_modes(reopened)
        if len(modes) != 1 or not modes[0].startswith("RGB"):
            raise DataError(
                "a picture of 16 bits whose values are all small would be dark; save it with 8 bits"
            )
        # Read in the other byte order, Pillow's "upper" eight bits are the lower eight bits.
        swapped = modes[0][:-1] + ("L" if modes[0].endswith("B") else "B")
        (tile,) = reopened.tile
        args = swapped if isinstance(tile.args, str) else (swapped, *(tile.args or ())[1:])
        reopened.tile = [tile._replace(args=args)]
        values = upper.astype(np.uint16) << 8 | np.asarray(reopened)
    bits = _depth(values[..., :3])
    scaled = np.asarray(_eight_bits(values[..., :3]))
    alpha = [] if image.mode == "RGB" else [upper[..., 3:]]
    image.paste(Image.fromarray(np.concatenate([scaled, *alpha], axis=2), image.mode))
    return bits


def _depth(values: NDArray[Any]) -> int:
    """The smallest of DEPTHS that holds all values."""
    largest = int(values.max())
    return next(bits for bits in DEPTHS if largest < 1 << bits)


def _eight_bits(values: NDArray[Any]) -> Image.Image:
    """The image of `values`, scaled from their depth to eight bits."""
    top = (1 << _depth(values)) - 1
    # Rounds to the nearest value, halves up. A table avoids 64-bit arithmetic on all pixels, which
    # would take eight times the memory of the image.
    table = ((np.arange(top + 1, dtype=np.int64) * 510 + top) // (2 * top)).astype(np.uint8)
    return Image.fromarray(table[values])


def _raw_modes(image: Image.Image) -> list[str]:
    """The formats of the pixels in an opened file that is not yet decoded, such as "RGB;16B"."""
    tiles = getattr(image, "tile", [])
    return [str(tile[3] if isinstance(tile[3], str) else (tile[3] or [""])[0]) for tile in tiles]


def _silence() -> None:
    """Hides Pillow's warnings (about large images, odd EXIF blocks, palettes). Errors are reported
    with the row."""
    if not any(
        entry[0] == "ignore" and entry[3] is not None and entry[3].pattern == PILLOW
        for entry in warnings.filters
    ):
        warnings.filterwarnings("ignore", module=PILLOW)


def _reason(error: Exception) -> str:
    """Pillow's reason in one line of at most 200 characters."""
    return shortened(one_line(error), 200)
