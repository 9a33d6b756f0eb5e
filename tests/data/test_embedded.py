"""Pictures inside rows: every way to write one gives the same picture, and none stays in memory."""

from __future__ import annotations

import base64
import json
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from opd.data import read_dataset
from opd.data.embedded import content, is_embedded
from opd.data.images import open_image
from opd.data.pictures import Pictures
from opd.data.sources import Place, Sources
from opd.errors import DataError
from opd.types import EncodedImage, Picture


def encoded(format: str = "png", size: tuple[int, int] = (40, 20), **options: Any) -> bytes:
    file = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(file, format, **options)
    return file.getvalue()


PNG = encoded()
TEXT = base64.b64encode(PNG).decode()


def sources(row: dict[str, Any], singular: str = "image") -> tuple[EncodedImage, ...]:
    place = Place("rows.parquet:17", (Path("rows.parquet"),), lambda: row)
    return Sources(Path("folder")).of_row(row, singular, place)


@pytest.mark.parametrize(
    "value",
    [
        PNG,
        bytearray(PNG),
        memoryview(PNG),
        TEXT.encode(),
        TEXT,
        TEXT.rstrip("="),
        base64.urlsafe_b64encode(PNG).decode(),
        base64.encodebytes(PNG).decode(),
        TEXT.replace("\n", "\r\n"),
        f"  {TEXT}\n",
        f"data:image/png;base64,{TEXT}",
        f"data:;base64,{TEXT}",
        f"DATA:image/png;charset=utf-8;BASE64,{TEXT}".encode(),
        f"data:image/png,{quote_from_bytes(PNG)}",
        {"bytes": PNG, "path": "other.png"},
        {"bytes": PNG},
        {"bytes": TEXT, "path": None},
        {"bytes": f"data:image/png;base64,{TEXT}", "path": None},
        {"url": f"data:image/png;base64,{TEXT}", "detail": "high"},
    ],
    ids=lambda value: f"{type(value).__name__} {value!s:.30}".split(" at 0x")[0],
)
def test_every_way_to_write_a_picture_gives_the_same(value: Any) -> None:
    (picture,) = sources({"image": value})
    assert isinstance(picture, Picture)
    assert (picture.name, picture.read()) == ("rows.parquet:17 image", PNG)
    assert picture.files == (Path("rows.parquet"),)
    first, second = sources({"images": ["a.png", value]}, "image")
    assert (first, second.name) == (Path("folder/a.png"), "rows.parquet:17 images[1]")
    assert isinstance(second, Picture)
    assert second.read() == PNG
    np.testing.assert_array_equal(open_image(second), open_image(Image.open(BytesIO(PNG))))


@pytest.mark.parametrize("format", ["png", "jpeg", "gif", "webp", "bmp", "tiff", "avif"])
def test_base64_of_every_common_format_is_recognised(format: str) -> None:
    assert is_embedded(base64.b64encode(encoded(format, (3, 2))).decode())


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ("a.png", "folder/a.png"),
        ("iVBORw0KGgo.png", "folder/iVBORw0KGgo.png"),
        ("Qkfiles/of/a/person/in/a/folder/without/suffix", None),
        ("/work/data/of/a/person/in/a/deep/folder/without/a/suffix", None),
        ("/9j/4AAQ.jpg", None),
        ({"bytes": None, "path": "a.png"}, "folder/a.png"),
        ({"path": "a.png"}, "folder/a.png"),
        ({"url": "a.png"}, "folder/a.png"),
        (Path("a.png"), "folder/a.png"),
        ("/".join(["deep"] * 300), None),
    ],
)
def test_paths_stay_paths(value: Any, path: str | None) -> None:
    assert sources({"image": value}) == (Path(path) if path else Path("folder") / str(value),)


def test_a_picture_of_a_program_is_taken_as_it_is() -> None:
    (embedded,) = sources({"image": PNG})
    assert sources({"images": [embedded]}) == (embedded,)


@pytest.mark.parametrize(
    "value",
    [{}, {"bytes": None}, {"bytes": 5}, {"path": 5}, {"url": ""}, [], [TEXT], 5, True, "", " ",
     {"bytes": [137, 80]}, {"array": [[0]]}, "x." * 40_000, object()],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_other_values_are_told(value: Any) -> None:
    with pytest.raises(DataError, match=r"field 'image': .* is not a path, bytes, base64 or a URL"):
        sources({"image": value})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"", "the picture is empty"),
        ({"bytes": b"", "path": "a.png"}, "the picture is empty"),
        ({"bytes": "", "path": "a.png"}, "the picture is empty"),
        ("data:", "a data URI without a comma"),
        ("data:image/png;base64," + TEXT[:50] + "!" + TEXT[50:], "the text is not base64"),
        (TEXT[:100] + "!!!!" + TEXT[100:], "the text is not base64"),
        (f"data:image/png;base64,data:image/png;base64,{TEXT}", "the text is not base64"),
        (f"data:image/png;base64,{TEXT[:50]}\ud83d", "the text is not base64"),
        (TEXT[:100] + "=" + TEXT[100:], "the text is not base64"),
        (TEXT[:101], "the text is not base64, or is cut off"),
        ({"bytes": "tea\ud83d"}, "the text is not base64"),
        ({"bytes": "C:\\a.png"}, "the text is not base64"),
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "ignore").decode(),
)
def test_a_picture_that_cannot_be_decoded_says_why(value: Any, message: str) -> None:
    (picture,) = sources({"image": value})
    fault = f"image cannot be read: rows.parquet:17 image: {message}"
    assert Pictures(1 << 20)(picture).fault.startswith(fault)
    with pytest.raises(DataError) as caught:
        open_image(picture)
    assert str(caught.value).startswith(fault)


def test_bytes_that_are_too_many_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.data.embedded.MAX_BYTES", 100)
    for value in (PNG, TEXT[:180]):
        with pytest.raises(DataError, match=r"bytes, above 100; save it to a file"):
            content(value)
    with pytest.raises(DataError, match=r"characters, above 200; save it to a file"):
        content(TEXT)


def test_a_row_that_has_changed_is_told() -> None:
    row: dict[str, Any] = {"images": [PNG, PNG]}
    _, picture = sources(row)
    assert isinstance(picture, Picture)
    for changed in ([PNG], PNG, None, [PNG, None], [PNG, 5]):
        row["images"] = changed
        with pytest.raises(DataError, match=r"images\[1\]: "):
            picture.read()


@given(
    st.one_of(
        st.text(max_size=3000), st.binary(max_size=3000), st.text("AZaz09+/=-_\n.", max_size=3000)
    )
)
def test_any_value_is_a_picture_a_path_or_one_clear_line(value: str | bytes) -> None:
    said = ""
    try:
        (source,) = sources({"image": value})
        if isinstance(source, Picture):
            assert isinstance(source.read(), bytes)
    except DataError as error:
        said = str(error)
    assert "\n" not in said.encode().decode()


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_rows_with_pictures_inside_are_read_as_rows_with_files(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    row = {"image": "a.png", "question": "?", "boxes": [[1, 2, 11, 12]], "teacher_image": "a.png"}
    inside = {**row, "image": TEXT, "teacher_image": f"data:image/png;base64,{TEXT}"}
    faulty = {**row, "image": TEXT[:100]}
    (file,) = read_dataset(write(tmp_path / "files.jsonl", row))
    data = read_dataset(write(tmp_path / "data.jsonl", inside, faulty, inside))
    assert [one.boxes for one in data] == [file.boxes] * 2
    (image,), (teacher_image,) = data[0].images, data[0].teacher_images
    np.testing.assert_array_equal(open_image(image), open_image(file.images[0]))
    np.testing.assert_array_equal(open_image(teacher_image), open_image(file.images[0]))
    ((source, reason),) = data.skipped
    assert source == "data.jsonl:2"
    assert reason.startswith("field 'image': image cannot be read: data.jsonl:2 image: ")
    assert data[0].images == read_dataset(tmp_path / "data.jsonl")[0].images != data[1].images


def test_no_content_of_a_picture_stays_in_memory() -> None:
    large = base64.b64encode(encoded(size=(400, 300))).decode()
    place = Place("a.jsonl:1", (), lambda: json.loads(f'{{"image": "{large}"}}'))
    found = []
    tracemalloc.start()
    for _ in range(20):
        (picture,) = Sources(Path()).of_row(place.again(), "image", place)
        assert Pictures(1 << 20)(picture).size == (400, 300)
        found.append(picture)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < len(large)
