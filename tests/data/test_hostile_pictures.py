"""A hundred pictures and picture values that are wrong or meant to harm: each makes its row faulty
with one clear line, in little time and memory."""

from __future__ import annotations

import base64
import io
import json
import struct
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd.data import read_dataset
from opd.data.pictures import Pictures
from opd.data.sources import Place, Sources
from opd.errors import DataError
from tests.data.test_archives import tarred, zipped
from tests.data.test_embedded import encoded

PNG = encoded()
PIXELS = 1 << 20
"""The bound on pixels here."""


def base64_of(content: bytes) -> str:
    return base64.b64encode(content).decode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, data: bytes | None = None) -> bytes:
    """A PNG of 8-bit grey with any size in its header."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = zlib.compress(bytes(100)) if data is None else data
    return (
        b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + head


def gif(width: int, height: int) -> bytes:
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0, 0, 0) + b";"


def tiff(*entries: tuple[int, int, int, int]) -> bytes:
    body = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4)


BOMB = zlib.compress(bytes(100_000_000), 9)
"""A hundred megabytes of zeros in a hundred kilobytes."""

CONTENTS: dict[str, bytes] = {
    "no bytes": b"",
    "one byte": b"\x89",
    "zeros": bytes(5000),
    "text": b"hello",
    "a path": b"../../etc/passwd",
    "json": b'{"image": "a.png"}',
    "python": b"__import__('os').system('true')",
    "pickle": b"\x80\x04cos\nsystem\n.",
    "html": b"<!doctype html><html></html>",
    "svg": b"<?xml version='1.0'?><svg xmlns='x'><script>x</script></svg>",
    "svg with entities": b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><svg>&a;</svg>",
    "pdf": b"%PDF-1.7\n" + bytes(100),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n%%EOF\n",
    "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "video": b"\0\0\0\x18ftypisom\0\0\0\0isommp42",
    "heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
    "avif head": b"\0\0\0\x18ftypavif\0\0\0\0avifmif1",
    "zip": b"PK\x03\x04" + bytes(100),
    "gzip": b"\x1f\x8b\x08" + bytes(100),
    "elf": b"\x7fELF" + bytes(100),
    "png signature": b"\x89PNG\r\n\x1a\n",
    "png cut in its header": PNG[:20],
    "png cut in its pixels": PNG[:1000],
    "png with a wrong checksum": PNG[:40] + b"xxxx" + PNG[44:],
    "png bomb": png(60_000, 60_000, data=BOMB),
    "png of the most pixels": png(2**31 - 1, 2**31 - 1),
    "png without width": png(0, 10),
    "png of too few pixels": png(900, 900),
    "png with too many bytes of pixels": png(10_000, 10, data=zlib.compress(bytes(10))),
    "png with a text bomb": png(9, 9, chunk(b"zTXt", b"a\0\0" + BOMB), data=b"x"),
    "png with a profile bomb": png(9, 9, chunk(b"iCCP", b"a\0\0" + BOMB), data=b"x"),
    "png with exif that is none": png(9, 9, chunk(b"eXIf", b"xx" * 100), data=b"x"),
    "png without pixels": b"\x89PNG\r\n\x1a\n" + png(9, 9)[8:33] + chunk(b"IEND", b""),
    "png of an endless chunk": b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 2**31 - 1) + b"IDAT",
    "jpeg signature": b"\xff\xd8\xff",
    "jpeg cut": encoded("jpeg", (200, 200))[:3000],
    "jpeg of many pixels": encoded("jpeg").replace(
        struct.pack(">HH", 20, 40), struct.pack(">HH", 65535, 65535)
    ),
    "jpeg of markers": b"\xff\xd8" + b"\xff\xe1\x00\x02" * 5000,
    "jpeg of fill bytes": b"\xff\xd8" + b"\xff" * 5000,
    "gif of many pixels": gif(65535, 65535),
    "gif without frames": gif(9, 9),
    "bmp of many pixels": bmp(2**31 - 1, 2**31 - 1),
    "bmp of negative width": bmp(-5, 5),
    "bmp without pixels": bmp(9, 9),
    "tiff without entries": tiff(),
    "tiff of many pixels": tiff((256, 4, 1, 2**31), (257, 4, 1, 2**31), (259, 3, 1, 1)),
    "tiff that points to itself": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "tiff with an offset out of it": b"II*\0\xff\xff\xff\x7f",
    "tiff with a count of billions": tiff((256, 4, 2**32 - 1, 8), (257, 4, 1, 9)),
    "webp head": b"RIFF\x10\0\0\0WEBPVP8 ",
    "webp cut": encoded("webp")[:300],
    "webp of a wrong size": b"RIFF\xff\xff\xff\xffWEBPVP8L" + bytes(50),
    "ico of nothing": b"\0\0\x01\0\xff\xff" + bytes(40),
    "psd of many pixels": b"8BPS\0\x01" + bytes(6) + struct.pack(">HIIHH", 3, 300000, 300000, 8, 3),
    "ppm of many pixels": b"P6 99999 99999 255\n",
    "ppm of digits": b"P6 " + b"9" * 5000,
    "floats": b"Pf\n9 9\n-1.0\n" + bytes(4 * 81),
    "xbm": b"#define im_width 60000\n#define im_height 60000\nstatic char im_bits[] = {\n",
    "fits": b"SIMPLE  =                    T" + b" " * 3000,
    "dds": b"DDS " + struct.pack("<I", 124) + b"\xff" * 120,
    "jpeg 2000": b"\0\0\0\x0cjP  \r\n\x87\n" + b"\xff" * 100,
    "qoi of many pixels": b"qoif" + struct.pack(">II", 2**31, 2**31) + b"\x03\0",
    "icns": b"icns" + struct.pack(">I", 2**31) + b"ic10" + struct.pack(">I", 2**31),
    "blp": b"BLP2" + b"\xff" * 200,
    "sgi": struct.pack(">hBBHHHH", 474, 1, 1, 3, 65535, 65535, 3) + bytes(600),
    "pcx": b"\x0a\x05\x01\x08" + b"\xff" * 200,
    "tga": bytes([0, 0, 2]) + bytes(9) + struct.pack("<HH", 65535, 65535) + b"\x18\0" + bytes(50),
}  # fmt: skip
"""Contents of pictures. Each is tried as bytes, and as base64 with a head."""

URI = "data:image/png;base64,"

VALUES: dict[str, Any] = {
    "nothing": {},
    "nulls": {"bytes": None, "path": None},
    "a number": 5,
    "true": True,
    "numbers": [137, 80, 78, 71],
    "a list of a list": [["a.png"]],
    "no text": "",
    "blanks": " \n\t ",
    "bytes that are numbers": {"bytes": [137, 80]},
    "an array": {"array": [[0, 0], [0, 0]]},
    "a path that is a number": {"path": 7},
    "a url that is none": {"url": None},
    "a nested object": {"bytes": {"bytes": base64_of(PNG)}},
    "half a character": "\ud83d.png",
    "half a character in base64": base64_of(PNG)[:200] + "\ud83d",
    "a nul": "a\0.png",
    "a line": "a\nb.png",
    "escapes": "\x1b[2J\x1b]0;x\x07.png",
    "a long name": "x" * 300 + ".png",
    "a long path": "x/" * 30_000 + "a.png",
    "a longer path": "x." * 40_000,
    "a file of the system": "/etc/passwd",
    "a file outside": "../../../../../../etc/passwd",
    "a device": "/dev/zero",
    "a random device": "/dev/urandom",
    "a terminal": "/dev/stdin",
    "the environment": "/proc/self/environ",
    "a folder": "/",
    "the folder": ".",
    "a user's home": "~root/a.png",
    "a file url": "file:///etc/passwd",
    "a file url of windows": "FILE://C:/a.png",
    "an http url": "http://127.0.0.1:1/a.png",
    "a url in an object": {"url": "https://127.0.0.1:1/a.png"},
    "another url": "gopher://127.0.0.1/a.png",
    "a script": "javascript:alert(1)",
    "a data uri without a picture": "data:",
    "a data uri without content": URI,
    "a data uri of text": "data:text/plain,hello",
    "a data uri of a path": "data:image/png,../../etc/passwd",
    "a data uri in a data uri": f"{URI}{URI}{base64_of(PNG)}",
    "base64 of a data uri": f"{URI}{base64_of(f'{URI}{base64_of(PNG)}'.encode())}",
    "base64 of base64 of base64": URI + base64_of(base64_of(base64_of(PNG).encode()).encode()),
    "base64 that is cut": base64_of(PNG)[:1001],
    "base64 with a stranger": base64_of(PNG)[:500] + "!" + base64_of(PNG)[500:],
    "base64 with padding inside": base64_of(PNG)[:500] + "==" + base64_of(PNG)[500:],
    "much base64": base64_of(bytes(36_000_000)),
    "much base64 of a picture's head": base64_of(PNG[:30] + bytes(36_000_000)),
    "many blanks": URI + " " * 10_000_000,
    "many percents": "data:image/png," + "%41" * 1_000_000,
    "percents that are none": "data:image/png,%zz%",
}


@pytest.fixture
def peak() -> Iterator[None]:
    """The test takes at most a minute, and 600 MB of Python's memory."""
    tracemalloc.start()
    began = time.monotonic()
    yield
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 600_000_000
    assert time.monotonic() - began < 60


def fault(folder: Path, value: Any) -> str:
    """What is said of a row with this picture value; empty if the picture can be used."""
    row = {"image": value}
    place = Place("data.jsonl:7", (), lambda: row)
    try:
        (source,) = Sources(folder).of_row(row, "image", place)
    except DataError as error:
        return str(error)
    return Pictures(PIXELS)(source).fault


def check(said: str) -> None:
    assert said
    assert len(said) < 700
    assert said.isprintable()
    assert said.encode()


def test_there_are_a_hundred() -> None:
    assert 2 * len(CONTENTS) + len(VALUES) >= 100


@pytest.mark.usefixtures("peak")
@pytest.mark.parametrize("name", CONTENTS)
def test_a_hostile_content_is_a_fault_of_one_line(tmp_path: Path, name: str) -> None:
    content = CONTENTS[name]
    check(fault(tmp_path, content))
    check(fault(tmp_path, f"data:image/png;base64,{base64_of(content)}"))


@pytest.mark.usefixtures("peak")
@pytest.mark.parametrize("name", VALUES)
def test_a_hostile_value_is_a_fault_of_one_line(tmp_path: Path, name: str) -> None:
    check(fault(tmp_path, VALUES[name]))


def test_rows_with_hostile_values_are_skipped_and_counted(tmp_path: Path) -> None:
    """All of them in one file, between rows that can be used."""
    row = {"question": "?", "boxes": [[1, 2, 11, 12]]}
    (tmp_path / "a.png").write_bytes(PNG)
    hostile = [value for name, value in VALUES.items() if not name.startswith("m")]
    hostile += [f"{URI}{base64_of(content)}" for content in CONTENTS.values()]
    rows = [{**row, "image": value} for value in ["a.png", *hostile, base64_of(PNG)]]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    data = read_dataset(path, max_image_pixels=PIXELS)
    assert [one.source for one in data] == ["data.jsonl:1", f"data.jsonl:{len(rows)}"]
    assert len(data.skipped) == len(hostile)
    for source, reason in data.skipped:
        check(f"{source}: {reason}")


def mutated(content: bytes, changes: list[tuple[int, int]], end: int) -> bytes:
    """Content with other values of some bytes, and cut at the end."""
    array = bytearray(content)
    for place, value in changes:
        array[place % len(array)] = value
    return bytes(array[: len(array) - end % len(array)] if end % 3 == 0 else array)


CHANGES = st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), max_size=8)
QUICK = settings(max_examples=150, deadline=5000, suppress_health_check=list(HealthCheck))


@QUICK
@given(st.sampled_from(["png", "jpeg", "gif", "webp", "bmp", "tiff"]), CHANGES, st.integers(0, 999))
def test_any_damage_of_a_picture_is_a_picture_or_one_line(
    format: str, changes: list[tuple[int, int]], end: int
) -> None:
    said = fault(Path(), mutated(encoded(format, (16, 12)), changes, end))
    assert not said or check(said) is None


@QUICK
@given(st.sampled_from([".zip", ".tar", ".tar.gz"]), CHANGES, st.integers(0, 9999))
def test_any_damage_of_an_archive_is_a_picture_or_one_line(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    changes: list[tuple[int, int]],
    end: int,
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        path = folder / f"images{suffix}"
        path.write_bytes(mutated(ARCHIVES[suffix], changes, end))
        said = fault(folder, "images/1.png")
    assert not said or check(said) is None


def _archives() -> dict[str, bytes]:
    files = {f"images/{number}.png": encoded(size=(8, 6)) for number in range(4)}
    written = {}
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz")):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        written[suffix] = file.getvalue()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped_archive:
        for name, content in files.items():
            zipped_archive.writestr(name, content)
    return {**written, ".zip": file.getvalue()}


ARCHIVES = _archives()


@pytest.mark.parametrize("write", [zipped, tarred])
def test_hostile_contents_in_an_archive_are_faults_of_one_line(tmp_path: Path, write: Any) -> None:
    names = {f"images/{number}": content for number, content in enumerate(CONTENTS.values())}
    write(tmp_path / f"images.{write.__name__[:3]}", names)
    for name in names:
        check(fault(tmp_path, name))
