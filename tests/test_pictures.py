"""Picture files: bits, bounds, formats, few of many, and what is kept of them."""

from __future__ import annotations

import json
import os
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

from opd.data import dataset, open_data, pictures, read_jsonl, spread
from opd.data.pictures import PixelBudget, places
from opd.errors import DataError
from opd.images import open_image
from opd.types import Box, Example
from opd.view import ViewOptions, enlarged, teacher_images

RAMP = np.tile(np.linspace(0, 4095, 64).astype(np.uint16), (8, 1))
"""Twelve bits from black to white."""


def png(path: Path, values: NDArray[np.uint16]) -> None:
    """A PNG of 16 bits a channel, which Pillow cannot write."""
    height, width, channels = values.shape
    head = struct.pack(">IIBBBBB", width, height, 16, {2: 4, 3: 2, 4: 6}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    body = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def row(image: str | list[str], **fields: Any) -> dict[str, Any]:
    return {"image" if isinstance(image, str) else "images": image, "question": "?", "boxes": [[1, 1, 5, 5]], **fields}


@pytest.mark.parametrize(("bits", "top"), [(8, 255), (10, 1023), (12, 4095), (14, 16383), (16, 65535)])
@pytest.mark.parametrize("kind", ["grey.png", "grey.tif", "colour.png", "clear.png"])
def test_a_picture_of_few_bits_in_sixteen_is_not_dark(tmp_path: Path, kind: str, bits: int, top: int) -> None:
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
    np.testing.assert_allclose(image[..., 0], expected, atol=1 if bits == 16 and "grey" not in kind else 0)
    if not kind.startswith("grey"):
        np.testing.assert_allclose(image[..., 1], np.floor(values // 2 / top * 255 + 0.5), atol=1 if bits == 16 else 0)
    notes = read_jsonl(write(tmp_path, row(kind), row(kind))).notes
    stretched = [f"1 picture holds {bits} bits in 16 (no value above {top}): stretched, as they would be dark"]
    assert notes == (stretched if bits in (10, 12, 14) else [])


def test_black_stays_black_and_grey_with_alpha_is_told(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(tmp_path / "black.png")
    assert np.asarray(open_image(tmp_path / "black.png")).max() == 0
    png(tmp_path / "la.png", np.stack([RAMP, np.full_like(RAMP, 65535)], axis=2))
    with pytest.raises(DataError, match=r"la.png: a picture of 16 bits whose values are all small would be dark; save it with 8 bits"):
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
            "HEIC pictures need pillow-heif: pip install pillow-heif, or save the picture as PNG or JPEG",
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
    (tmp_path / "pillow_heif.py").write_text("from PIL import Image\nadded = []\ndef register_heif_opener():\n    added.append(1)\n")
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
    (tmp_path / "exif.jpg").write_bytes(whole[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + whole[2:])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name in ("palette.png", "a.jpg", "exif.jpg"):
            open_image(tmp_path / name)
        (crop,) = teacher_images(Example("a", (tmp_path / "a.jpg",), "?", (Box(0, 0, 38, 19),)), ViewOptions(margin=0, min_size=1))
    assert crop.size == (38, 19)
    assert [str(one.message) for one in caught] == []


def test_the_bound_on_pixels_is_the_options_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (40, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses above 200
    (one,) = open_data(str(write(tmp_path, row("a.png"))), max_image_pixels=800)
    assert one.max_image_pixels == 800
    assert teacher_images(one, ViewOptions())[0].size == (48, 48)
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(DataError, match=r"a.png: 40 x 20 = 800 pixels, above data.max_image_pixels = 799; raise it"):
        open_image(tmp_path / "a.png", 799)


def test_the_pictures_of_a_row_are_bounded_together(tmp_path: Path) -> None:
    Image.new("L", (40, 20)).save(tmp_path / "a.png")
    path = write(tmp_path, row("a.png"), row(["a.png"] * 4), row(["a.png"] * 5))
    data = open_data(str(path), max_image_pixels=800)
    assert len(data) == 2
    ((_, reason),) = data.skipped  # type: ignore[attr-defined]
    assert reason == "field 'image': 4000 pixels in 5 pictures, above 4 x data.max_image_pixels = 800"


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
    size: tuple[int, int], min_size: int, enlarge: float, bound: int | None, expected: tuple[int, int]
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

    threads = [threading.Thread(target=read, args=(pixels,)) for pixels in [40, 30, 500, 60, 99, 1] * 5]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(most) == 30
    assert max(most) <= 100


def test_reading_many_pictures_holds_no_more_than_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert len(read_jsonl(write(tmp_path, *(row(f"{number}.png") for number in range(16))))) == 16
    assert len(most) == 16
    assert max(most) <= 2000


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A data file of 200 rows with a picture each, old enough to be kept."""
    for number in range(200):
        path = tmp_path / f"{number}.png"
        Image.new("L", (20, 10), number).save(path)
    time.sleep(pictures.SETTLED + 0.05)
    return write(tmp_path, *(row(f"{number}.png", id=number) for number in range(200)))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures that are decoded."""
    names: list[str] = []
    opened = pictures.opened

    def watch(path: Path, *bound: int) -> Any:
        names.append(path.name)
        return opened(path, *bound)

    monkeypatch.setattr(pictures, "opened", watch)
    return names


def test_few_rows_decode_few_pictures_and_are_those_of_the_whole(many: Path, decoded: list[str]) -> None:
    few = read_jsonl(many, count=20)
    assert [one.id for one in few] == [str(number) for number in range(0, 200, 10)]
    assert len(decoded) == 20
    for number in (0, 1, 50, *range(100, 120)):  # faulty rows, two of them where few rows would be taken, and whole stretches
        (many.parent / f"{number}.png").write_bytes(b"")
    whole = read_jsonl(many)
    for count in (1, 3, 20, 150, 177, 178, 500):
        decoded.clear()
        few = read_jsonl(many, count=count)
        assert [one.id for one in few] == [one.id for one in spread(whole, count)]
        assert len(few) == min(count, 177)
        assert set(few.skipped) <= set(whole.skipped)
        assert len(few) + len(few.skipped) <= len(whole) + len(whole.skipped)
    assert len(whole.skipped) == 23
    assert read_jsonl(many, count=1).skipped == whole.skipped[:2]
    with pytest.raises(DataError, match="strict mode"):
        read_jsonl(many, strict=True, count=3)
    assert [one.id for one in spread([few[0], few[1]], 5)] == [few[0].id, few[1].id]


def test_what_was_decoded_is_not_decoded_again(many: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    first = read_jsonl(many)
    store = places(many)[0]
    assert len(decoded) == 200
    assert first.notes == [f"sizes and hashes of the pictures are kept in {store}: the next reading decodes only what has changed"]
    decoded.clear()
    monkeypatch.chdir(many.parent)
    again = read_jsonl(Path(many.name))
    assert (decoded, again.notes, again.fingerprint) == ([], [], first.fingerprint)
    assert again[7] == Example(**{**vars(first[7]), "images": again[7].images})
    with pytest.raises(DataError, match=r"above data.max_image_pixels = 199"):
        read_jsonl(many, max_image_pixels=199)


def test_a_picture_that_changed_is_decoded_again(many: Path, decoded: list[str]) -> None:
    first = read_jsonl(many)
    decoded.clear()
    before = (many.parent / "3.png").stat()
    content = bytearray((many.parent / "3.png").read_bytes())
    # The same size, inode and time of change; another time of its record, which nobody can set.
    Image.new("L", (20, 10), 77).save(many.parent / "other.png")
    other = (many.parent / "other.png").read_bytes()
    assert len(other) == len(content)
    with (many.parent / "3.png").open("r+b") as file:
        file.write(other)
    os.utime(many.parent / "3.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    Image.new("L", (30, 10)).save(many.parent / "4.png")
    os.replace(many.parent / "6.png", many.parent / "5.png")
    (many.parent / "7.png").write_bytes(b"")
    second = read_jsonl(many)
    assert sorted(decoded) == ["3.png", "4.png", "5.png", "6.png", "7.png"]
    assert second.fingerprint != first.fingerprint
    assert [source for source, _ in second.skipped] == ["data.jsonl:7", "data.jsonl:8"]


def test_a_picture_that_was_just_written_is_not_kept(many: Path, decoded: list[str]) -> None:
    """A change in the same tick of the clock would not show."""
    now = time.time_ns() + 10_000_000_000
    os.utime(many.parent / "9.png", ns=(now, now))
    read_jsonl(many)
    decoded.clear()
    read_jsonl(many)
    assert decoded == ["9.png"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff",
        b"[]",
        b"{}",
        b'{"version": 1, "pictures": []}',
        b"[" * 100_000,
        b'{"version": 1, "pictures": {"3.png": [1], "4.png": 5}}',
    ],
)
def test_a_damaged_store_is_ignored_and_replaced(many: Path, decoded: list[str], content: bytes) -> None:
    first = read_jsonl(many)
    whole = places(many)[0].read_bytes()
    places(many)[0].write_bytes(content)
    decoded.clear()
    assert read_jsonl(many).fingerprint == first.fingerprint
    assert len(decoded) == 200
    assert places(many)[0].read_bytes() == whole


def test_a_wrong_entry_is_not_believed(many: Path, decoded: list[str]) -> None:
    first = read_jsonl(many)
    store = json.loads(places(many)[0].read_text())
    for number, spoilt in enumerate(([0, 10], ["20", 10], [-5, 10])):
        store["pictures"][f"{number}.png"][4:6] = spoilt
    store["pictures"]["3.png"][6] = "0" * 63 + "g"
    places(many)[0].write_text(json.dumps(store))
    decoded.clear()
    assert read_jsonl(many).fingerprint == first.fingerprint
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]


def test_a_folder_that_cannot_be_written_has_its_store_in_the_users_cache(
    many: Path, decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == many.parent:
            raise PermissionError("read-only")
        replace(source, target)

    monkeypatch.setattr(pictures.os, "replace", refuse)
    assert f"kept in {tmp_path / 'cache' / 'opd'}" in read_jsonl(many).notes[0]
    assert [path for path in many.parent.iterdir() if path.name.startswith(".")] == []
    decoded.clear()
    read_jsonl(many)
    assert decoded == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(many))  # a file: nothing can be written anywhere
    assert read_jsonl(many).notes == []


def test_few_small_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    before = sorted(tmp_path.iterdir())
    read_jsonl(write(tmp_path, *[row("a.png")] * 500))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "data.jsonl"])


def test_rows_that_share_a_picture_decode_it_once(tmp_path: Path, decoded: list[str]) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    assert len(read_jsonl(write(tmp_path, *[row("a.png")] * 100))) == 100
    assert decoded == ["a.png"]


def test_many_faulty_rows_are_told_in_few_lines(tmp_path: Path) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "a.png")

    class Notes:
        lines: list[str] = []  # noqa: RUF012

        def note(self, message: str) -> None:
            self.lines.append(message)

    data = read_jsonl(write(tmp_path, row("a.png"), *[row("b.png")] * 100))
    data.tell(Notes())  # type: ignore[arg-type]
    assert len(Notes.lines) == dataset.TOLD + 1
    assert Notes.lines[-1] == "skipped 80 more rows, 100 in all"
