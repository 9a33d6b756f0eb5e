"""Few of many rows, and what is kept of pictures so that they are not decoded again."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from opd.data import dataset, images, picture_store, pictures, read_dataset, spread
from opd.data.picture_store import CHECKSUM, MAGIC, RECORD, ImageFacts, PictureStore, store_paths
from opd.data.pictures import Pictures
from opd.errors import DataError
from opd.types import Example


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


def test_few_rows_decode_few_pictures_and_are_those_of_the_whole(
    many: Path, decoded: list[str]
) -> None:
    few = read_dataset(many, count=20)
    assert [one.id for one in few] == [str(number) for number in range(0, 200, 10)]
    assert len(decoded) == 20
    # faulty rows, two of them where few rows would be taken, and whole stretches
    for number in (0, 1, 50, *range(100, 120)):
        (many.parent / f"{number}.png").write_bytes(b"")
    whole = read_dataset(many)
    for count in (1, 3, 20, 150, 177, 178, 500):
        decoded.clear()
        few = read_dataset(many, count=count)
        assert [one.id for one in few] == [one.id for one in spread(whole, count)]
        assert len(few) == min(count, 177)
        assert set(few.skipped) <= set(whole.skipped)
        assert len(few) + len(few.skipped) <= len(whole) + len(whole.skipped)
    assert len(whole.skipped) == 23
    assert read_dataset(many, count=1).skipped == whole.skipped[:2]
    with pytest.raises(DataError, match="strict mode"):
        read_dataset(many, strict=True, count=3)
    assert [one.id for one in spread([few[0], few[1]], 5)] == [few[0].id, few[1].id]


@pytest.mark.parametrize(
    ("usable", "count", "chosen"),
    [
        ("12...9", 2, "19"),  # the last row is the only one of its section
        ("1234", 3, "123"),
        (".234", 3, "234"),  # no row of the first section: the first row not tried fills in
        ("....5", 1, "5"),
        (".2..", 4, "2"),
    ],
)
def test_few_rows_come_from_every_section_to_the_last_row(
    tmp_path: Path, usable: str, count: int, chosen: str
) -> None:
    """A letter a row, a dot where its picture is missing."""
    Image.new("L", (20, 10)).save(tmp_path / "image.png")
    rows = [row("none.png" if id == "." else "image.png", id=id) for id in usable]
    few = read_dataset(write(tmp_path, *rows), count=count)
    assert "".join(one.id for one in few) == chosen


def test_what_was_decoded_is_not_decoded_again(
    many: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = read_dataset(many)
    store = store_paths(many)[0]
    assert len(decoded) == 200
    assert first.notes == [
        f"sizes and hashes of the pictures are kept in {store}: the next reading decodes only what"
        " has changed"
    ]
    decoded.clear()
    monkeypatch.chdir(many.parent)
    again = read_dataset(Path(many.name))
    assert (decoded, again.notes, again.fingerprint) == ([], [], first.fingerprint)
    assert again[7] == Example(**{**vars(first[7]), "images": again[7].images})
    with pytest.raises(DataError, match=r"above data.max_image_pixels = 199"):
        read_dataset(many, max_image_pixels=199)


def test_a_picture_that_changed_is_decoded_again(many: Path, decoded: list[str]) -> None:
    first = read_dataset(many)
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
    second = read_dataset(many)
    assert sorted(decoded) == ["3.png", "4.png", "5.png", "6.png", "7.png"]
    assert second.fingerprint != first.fingerprint
    assert [source for source, _ in second.skipped] == ["data.jsonl:7", "data.jsonl:8"]


def test_a_picture_that_was_just_written_is_not_kept(many: Path, decoded: list[str]) -> None:
    """A change in the same tick of the clock would not show."""
    now = time.time_ns() + 10_000_000_000
    os.utime(many.parent / "9.png", ns=(now, now))
    read_dataset(many)
    decoded.clear()
    read_dataset(many)
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
        MAGIC,
        MAGIC + bytes(CHECKSUM),
        MAGIC + bytes(CHECKSUM + RECORD.itemsize - 1),
        MAGIC + bytes(CHECKSUM + RECORD.itemsize * 5),
    ],
)
def test_a_damaged_store_is_ignored_and_replaced(
    many: Path, decoded: list[str], content: bytes
) -> None:
    first = read_dataset(many)
    whole = store_paths(many)[0].read_bytes()
    store_paths(many)[0].write_bytes(content)
    decoded.clear()
    assert read_dataset(many).fingerprint == first.fingerprint
    assert len(decoded) == 200
    assert store_paths(many)[0].read_bytes() == whole


def test_a_wrong_entry_is_not_believed(many: Path, decoded: list[str]) -> None:
    first = read_dataset(many)
    store = store_paths(many)[0]
    content = bytearray(store.read_bytes())
    for name in RECORD.names or ():
        place = len(MAGIC) + CHECKSUM + RECORD.fields[name][1]  # type: ignore[index]
        store.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        decoded.clear()
        assert read_dataset(many).fingerprint == first.fingerprint
        assert len(decoded) == 200
    store.write_bytes(content[: -RECORD.itemsize])
    read_dataset(many)
    assert len(decoded) == 400


def test_a_large_store_is_searched_and_keeps_the_last_of_each_picture(tmp_path: Path) -> None:
    store, data = PictureStore(tmp_path / "a.jsonl"), tmp_path / "a.jsonl"
    count, state = 3 * picture_store.PENDING, [1, 2, 3, 4]
    facts = [ImageFacts((number + 1, 7), bytes([number % 256] * 32)) for number in range(count)]
    for number, one in enumerate(facts):
        store.add(f"{number}.png", state, one)
    store.add("5.png", [9, 2, 3, 4], facts[7])
    store.add("\udc80.png", state, facts[8])
    assert store.save() == store_paths(data)[0]
    for reader in (store, PictureStore(data)):
        assert reader.get("5.png", [9, 2, 3, 4]) == facts[7]
        assert reader.get("5.png", state) is None
        assert reader.get("none.png", state) is None
        assert reader.get("\udc80.png", state) == facts[8]
        for number in range(0, count, 97):
            assert reader.get(f"{number}.png", state) == (facts[number] if number != 5 else None)
    size = store_paths(data)[0].stat().st_size
    assert size == len(MAGIC) + CHECKSUM + (count + 1) * RECORD.itemsize
    store.add("5.png", state, facts[5])
    store.save()
    assert PictureStore(data).get("5.png", state) == facts[5]
    assert store_paths(data)[0].stat().st_size == size


def test_memory_does_not_grow_with_the_pictures(
    tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The facts of the last ones are kept; others are in the store, or are decoded again."""
    monkeypatch.setattr(pictures, "KEPT", 5)
    for number in range(10):
        Image.new("L", (20, 10), number).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in (*range(10), 9, 5, 0)]
    reader = Pictures(1000)
    assert [reader(tmp_path / name).size for name in names] == [(20, 10)] * 13
    assert decoded == [*names[:10], "0.png"]
    time.sleep(pictures.SETTLED + 0.05)
    reader = Pictures(1000, tmp_path / "data.jsonl")
    for name in names:
        reader(tmp_path / name)
    assert decoded[11:] == names[:10]


def test_a_folder_that_cannot_be_written_has_its_store_in_the_users_cache(
    many: Path, decoded: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    beside = store_paths(many)[0]
    beside.mkdir()  # a file cannot take its place
    assert f"kept in {tmp_path / 'cache' / 'opd'}" in read_dataset(many).notes[0]
    assert [path for path in many.parent.iterdir() if path.name.startswith(".")] == [beside]
    decoded.clear()
    read_dataset(many)
    assert decoded == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(many))  # a file: nothing can be written anywhere
    assert read_dataset(many).notes == []


def test_few_small_pictures_leave_nothing_behind(tmp_path: Path) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    before = sorted(tmp_path.iterdir())
    read_dataset(write(tmp_path, *[row("a.png")] * 500))
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "data.jsonl"])


def test_rows_that_share_a_picture_decode_it_once(tmp_path: Path, decoded: list[str]) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    assert len(read_dataset(write(tmp_path, *[row("a.png")] * 100))) == 100
    assert decoded == ["a.png"]


def test_many_faulty_rows_are_told_in_few_lines(tmp_path: Path) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "a.png")

    class Notes:
        lines: list[str] = []  # noqa: RUF012

        def note(self, message: str) -> None:
            self.lines.append(message)

    data = read_dataset(write(tmp_path, row("a.png"), *[row("b.png")] * 100))
    data.tell(Notes())  # type: ignore[arg-type]
    assert len(Notes.lines) == dataset.TOLD + 1
    assert Notes.lines[-1] == "skipped 80 more rows, 100 in all"


def test_a_machine_without_memory_is_no_fault_of_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows that share the picture hear of it; a header that asks for too much is the picture's
    own fault."""
    Image.new("L", (20, 10)).save(tmp_path / "a.png")
    data = write(tmp_path, row("a.png"), row("a.png"), row("a.png"))

    def full(*given: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(pictures, "measured", full)
        with pytest.raises(MemoryError):
            read_dataset(data)
        with pytest.raises(MemoryError), images.opened(tmp_path / "a.png"):
            full()
    monkeypatch.setattr(images, "_open", full)
    with pytest.raises(DataError, match=r"a\.png: MemoryError"):
        read_dataset(data)
