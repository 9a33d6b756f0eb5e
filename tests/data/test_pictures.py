"""Picture files: bits, bounds and formats."""

from __future__ import annotations

import json
import struct
import threading
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from opd.data import open_data, pictures, read_dataset
from opd.data.images import open_image
from opd.data.pictures import PixelBudget
from opd.errors import DataError
from opd.types import Box, Example
from opd.views.crop import enlarged
from opd.views.images import teacher_images
from opd.views.view import ViewOptions

RAMP = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (8, 1))
"""Twelve bits from black to white."""


def png(path: Path, values: NDArray[np.uint16]) -> None:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def row(image: str | list[str], **fields: Any) -> dict[str, Any]:
    return {
        "image" if isinstance(image, str) else "images": image,
        "question": "?",
        "boxes": [[1, 1, 5, 5]],
        **fields,
    }


@pytest.mark.parametrize(
    ("bits", "top"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)]
)
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.png", "clear.png"])
def test_a_picture_of_few_bits_in_sixteen_is_not_dark(
    tmp_path: Path, kind: str, bits: int, top: int
) -> None:
    values = (RAMP.astype(np.int64) * top // 4095).astype(np.uint16)
    path = tmp_path / kind
    if kind.startswith("grey"):
        Image.fromarray(values).save(path)
    else:
        alpha = [np.full_like(values, 65535)] if kind == "clear.png" else []
        png(path, np.stack([values, values // 2, values, *alpha], axis=2))
    image = np.asarray(open_image(path))
    expected = np.floor(values / top * 255 + 0.5)
    # Pillow keeps the upper byte of 16-bit colours: one less at most.
    np.testing.assert_allclose(
        image[..., 0], expected, atol=1 if bits == 16 and "grey" not in kind else 0
    )
    if not kind.startswith("grey"):
        np.testing.assert_allclose(
            image[..., 1], np.floor(values // 2 / top * 255 + 0.5), atol=1 if bits == 16 else 0
        )
    notes = read_dataset(write(tmp_path, row(kind), row(kind))).notes
    stretched = [
        f"1 picture holds {bits} bits in 16 (no value above {top}): stretched, as they would be"
        " dark"
    ]
    assert notes == (stretched if bits in (10, 12, 14) else [])


def test_black_stays_black_and_grey_with_alpha_is_told(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "black.png")
    assert np.asarray(open_image(tmp_path / "black.png")).max() == 0
    png(tmp_path / "la.png", np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2))
    with pytest.raises(
        DataError,
        match=(
            r"la.png: a picture of 16 bits whose values are all small would be dark; save it with 8"
            r" bits"
        ),
    ):
        open_image(tmp_path / "la.png")


def test_twelve_bits_are_turned_upright_as_well(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(RAMP).save(tmp_path / "a.png", exif=exif)
    image = open_image(tmp_path / "a.png")
    assert image.size == (8, 64)
    assert np.asarray(image)[-1, 0, 0] == 255


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
            (
                "HEIC pictures need pillow-heif: pip install pillow-heif, or save the picture as"
                " PNG or JPEG"
            ),
        ),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC pictures need pillow-heif"),
        (b"\0\0\0\x18ftypavif\0\0\0\0avifmif1", "a damaged AVIF picture"),
        (b"\xff\x0a" + bytes(20), "JPEG XL pictures need pillow-jxl-plugin"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "a video, not an image"),
        (b"<!DOCTYPE html><html>", "a web page, not an image: its download failed"),
        (b"<?xml version='1.0'?><svg/>", "an SVG drawing"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_formats_without_a_reader_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content + bytes(100))
    with pytest.raises(DataError) as caught:
        open_image(tmp_path / "a.jpg")
    assert f"a.jpg: {message}" in str(caught.value)


def test_an_installed_plugin_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pillow_heif.py").write_text(
        "from PIL import Image\nadded = []\ndef register_heif_opener():\n    added.append(1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(50))
    with pytest.raises(DataError, match="a damaged HEIC picture"):
        open_image(tmp_path / "a.heic")
    import pillow_heif

    assert pillow_heif.added


def test_pillows_warnings_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large picture, a palette with odd transparency, a damaged EXIF block."""
    palette = Image.new("P", (10, 10))
    palette.putpalette([0] * 768)
    palette.save(tmp_path / "palette.png", transparency=bytes([10, 20, 255]))
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    block = b"Exif\0\0II*\0\x08\0\0\0\xff\0\x12\x01\x03\0\x01\0\0\0\x01\0\0\0"
    (tmp_path / "exif.jpg").write_bytes(
        whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:]
    )
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("palette.png", "a.jpg", "exif.jpg"):
            open_image(tmp_path / name)
        (crop,) = teacher_images(
            Example("a", (tmp_path / "a.jpg",), "?", (Box(0, 0, 38, 19),)),
            ViewOptions(margin=0, min_size=1),
        )
    assert crop.size == (38, 19)
    assert [str(one.message) for one in caught] == []


def test_the_bound_on_pixels_is_the_options_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (40, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses above 200
    (one,) = open_data(str(write(tmp_path, row("a.png"))), max_image_pixels=800)
    assert one.max_image_pixels == 800
    assert teacher_images(one, ViewOptions())[0].size == (48, 48)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(
        DataError, match=r"a.png: 40 x 20 = 800 pixels, above data.max_image_pixels = 799; raise it"
    ):
        open_image(tmp_path / "a.png", 799)


def test_the_pictures_of_a_row_are_bounded_together(tmp_path: Path) -> None:
    Image.new("L", (40, 20)).save(tmp_path / "a.png")
    path = write(tmp_path, row("a.png"), row(["a.png"] * 4), row(["a.png"] * 5))
    data = open_data(str(path), max_image_pixels=800)
    assert len(data) == 2
    ((_, reason),) = data.skipped  # type: ignore[attr-defined]
    assert (
        reason == "field 'image': 4000 pixels in 5 pictures, above 4 x data.max_image_pixels = 800"
    )


@pytest.mark.parametrize(
    ("size", "min_size", "enlarge", "bound", "expected"),
    [
        ((100, 50), 1, 2, 20_000, (200, 100)),
        ((100, 50), 1, 2, 10_000, (141, 70)),  # not above the bound
        ((100, 50), 1, 2, 4_000, (100, 50)),  # never made smaller
        ((12000, 9000), 48, 2, 1 << 24, (12000, 9000)),
        ((6000, 60), 1024, 1, 1 << 20, (10240, 102)),
        ((100, 50), 1, 2, None, (200, 100)),
    ],
)
def test_a_crop_is_enlarged_up_to_the_processors_bound(
    size: tuple[int, int],
    min_size: int,
    enlarge: float,
    bound: int | None,
    expected: tuple[int, int],
) -> None:
    assert enlarged(*size, min_size, enlarge, bound) == expected
    if bound:
        assert expected[0] * expected[1] <= max(bound, size[0] * size[1])


def test_threads_share_a_budget_of_pixels() -> None:
    budget, held, most = PixelBudget(100), [], []

    def read(pixels: int) -> None:
        with budget.hold(pixels):
            held.append(min(pixels, 100))
            most.append(sum(held))
            time.sleep(0.002)
            held.remove(min(pixels, 100))

    threads = [
        threading.Thread(target=read, args=(pixels,)) for pixels in [40, 30, 500, 60, 99, 1] * 5
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 30
    assert max(most) <= 100


def test_reading_many_pictures_holds_no_more_than_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(16):
        Image.new("L", (40, 20), number).save(tmp_path / f"{number}.png")
    held: list[int] = []
    most: list[int] = []
    measured = pictures.measured

    def slow(image: Image.Image) -> Any:
        held.append(image.width * image.height)
        most.append(sum(held))
        time.sleep(0.005)
        held.remove(image.width * image.height)
        return measured(image)

    monkeypatch.setattr(pictures, "measured", slow)
    monkeypatch.setattr(pictures, "POOL_PIXELS", 2000)
    assert len(read_dataset(write(tmp_path, *(row(f"{number}.png") for number in range(16))))) == 16
    assert len(most) == 16
    assert max(most) <= 2000
