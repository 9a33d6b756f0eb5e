"""Rows of any format, written as our own: the same examples are read, and converting again changes
nothing."""

from __future__ import annotations

import base64
import csv
import json
import os
import shutil
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opd.data import DataOptions, open_data
from opd.data.convert import convert
from opd.data.every import open_every
from opd.data.images import open_image
from opd.progress import Quiet
from opd.types import Box
from opd_cli import main
from tests.data.test_formats_of_others import ROWS, picture
from tests.support.dirty import dirty

ROW = {"image": "full.png", "question": "What?", "boxes": [[1, 2, 30, 40]]}
TURNED = 6
"""EXIF orientation of a picture that is stored lying on its side."""


def run(*arguments):
    return CliRunner().invoke(main, ["data", "convert", *map(str, arguments)])


def pictures(folder):
    for name in ("full", "framed", "crop"):
        (folder / f"{name}.png").write_bytes(picture())
    exif = Image.Exif()
    exif[0x0112] = TURNED
    Image.linear_gradient("L").resize((90, 60)).save(folder / "turned.jpg", exif=exif)
    (folder / "data.jsonl").unlink(missing_ok=True)


@pytest.fixture
def folder(tmp_path):
    pictures(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    pictures(folder)
    return folder


def write(path: Path, *rows) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.endswith(".opd-pictures")
    }


def same(before, after) -> None:
    """Holds examples to be the same, but for where their pictures and rows are."""
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        apart = {"source": "", "images": (), "teacher_images": ()}
        assert replace(other, **apart) == replace(one, **apart)
        for field in ("images", "teacher_images"):
            for first, second in zip(getattr(one, field), getattr(other, field), strict=True):
                assert np.array_equal(open_image(first), open_image(second))


def rows_of(path: Path, **options):
    return open_every(str(path), DataOptions(**options), Quiet(), evidence=False)


def converted(path: Path, out: Path, copy: bool = False, **options):
    return convert(rows_of(path, **options), out, Quiet(), copy)


@pytest.mark.parametrize("copy", ["keep", "copy"])
@pytest.mark.parametrize("key", ROWS)
def test_a_row_of_every_format(folder, key, copy):
    path, out = write(folder / "data.jsonl", ROWS[key]), folder / "own" / "rows.jsonl"
    before = open_data(str(path), evidence=False)
    done = run(path, out, "--images", copy)
    assert done.exit_code == 0, done.output
    assert f"{out}: 1 of 1 row" in done.stdout
    same(before, open_data(str(out), evidence=False))
    row = json.loads(out.read_text())
    for name in [row["image"], *([row["teacher_image"]] if "teacher_image" in row else [])]:
        assert (out.parent / name).is_file()
        assert copy == "keep" or name.startswith("rows-images/")
    written = content(folder)
    for source in (path, out):  # again, and what was converted
        assert run(source, out, "--images", copy).exit_code == 0
        assert content(folder) == written
    beside = folder / "own" / "again.jsonl"
    assert run(out, beside).exit_code == 0
    assert beside.read_bytes() == out.read_bytes()


def test_what_is_copied_can_be_moved(folder):
    assert run(write(folder / "data.jsonl", ROW), folder / "there/out.jsonl", "--images", "copy")
    moved = folder.parent / f"{folder.name}-moved"
    shutil.move(folder / "there", moved)
    (folder / "full.png").unlink()
    (found,) = open_data(str(moved / "out.jsonl"))
    assert found.boxes == (Box(1, 2, 30, 40),)
    assert found.images[0].read_bytes() == picture()


TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    str.strip
)
UNITS = {"pixels": (300, 200), "fraction": (1, 1), "per-mille": (1000, 1000)}


@st.composite
def own_rows(draw):
    """A row of our own, in whatever way it may be written."""
    kind = draw(st.sampled_from(["full.png", "bytes", "uri", "turned.jpg"]))
    text = base64.b64encode(picture()).decode()
    value = {"bytes": {"bytes": text}, "uri": f"data:image/png;base64,{text}"}.get(kind, kind)
    unit = draw(st.sampled_from(list(UNITS)))
    width, height = (60, 90) if (kind, unit) == ("turned.jpg", "pixels") else UNITS[unit]
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x0, y0 = (draw(st.floats(0, 0.8)) * side for side in (width, height))
        across, down = (draw(st.floats(0.05, 0.2)) * side for side in (width, height))
        corners = [x0, y0, min(x0 + across, width), min(y0 + down, height)]
        boxes.append(draw(st.sampled_from([corners, {"image": 0, "box": corners}])))
    row = {"question": draw(TEXTS), "boxes": boxes, "box_format": unit}
    if draw(st.booleans()):
        row["image"] = value
    else:
        row["images"] = [value, "crop.png"]
        across, down = UNITS[unit]
        second = [across / 8, down / 4, across / 2, down]
        row["boxes"].append({"image": 1, "box": second})
    optional = {
        "id": st.one_of(TEXTS, st.integers()),
        "teacher_question": TEXTS,
        "teacher_images": st.just(["crop.png", "full.png"]),
        "answer": st.one_of(TEXTS, st.integers(), st.lists(TEXTS, max_size=2)),
        "weight": st.floats(0, 10),
    }
    for name, values in optional.items():
        if draw(st.booleans()):
            row[name] = draw(values)
    if draw(st.booleans()):
        row |= {"choices": draw(st.lists(TEXTS, min_size=2, max_size=4)), "answer": "B"}
    return row


@given(st.lists(own_rows(), min_size=1, max_size=3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_the_same_examples_are_read(shared, rows, copy):
    path = write(shared / "data.jsonl", *rows)
    out = shared / "out.jsonl"
    read = list(rows_of(path).each(lambda _, example: example))
    before = [row for row in read if not isinstance(row, Exception)]
    done = converted(path, out, copy)
    assert sum(kind["count"] for kind in done.left_out.values()) == done.rows - done.written
    assert done.written == len(before), done.left_out
    if before:
        same(before, open_data(str(out), evidence=False))
        first = out.read_bytes()
        converted(out, out, copy)
        assert out.read_bytes() == first


def test_boxes_are_those_of_the_upright_picture(folder):
    row = {"image": "turned.jpg", "question": "What?", "boxes": [[0, 0, 30, 20]]}
    path = write(
        folder / "data.jsonl", row, row | {"box_format": "fraction", "boxes": [[0, 0, 0.5, 0.2]]}
    )
    converted(path, folder / "out.jsonl", box_image="stored")
    first, second = map(json.loads, (folder / "out.jsonl").read_text().splitlines())
    # Stored as 90 x 60 pixels, and turned to the right: the top left corner becomes the top right.
    assert first["boxes"] == [[40, 0, 60, 30]]
    assert second["boxes"] == [[48, 0, 60, 45]]
    assert open_image(folder / "turned.jpg").size == (60, 90)


def test_a_box_that_pixels_cannot_say_is_left_out(folder):
    """At most one pixel in the corner is refused as pixels: its unit would be in doubt."""
    row = {**ROW, "box_format": "fraction", "boxes": [[0, 0, 0.001, 0.001]]}
    path = write(folder / "data.jsonl", row, ROW)
    done = converted(path, folder / "out.jsonl")
    (left_out,) = done.left_out.values()
    assert (done.written, left_out["count"]) == (1, 1)
    assert left_out["first"][0].startswith("data.jsonl:1: field 'boxes': box [0, 0, 0.3, 0.2]")


def test_faulty_rows_are_named_and_left_out(tmp_path):
    made = dirty(tmp_path)
    done = run(made.path, tmp_path / "out.jsonl", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    no_evidence = made.defects["field 'boxes' is missing: the evidence as"]
    assert found["written"] == made.usable + no_evidence
    assert found["rows"] - found["written"] == made.defects.total() - no_evidence
    kinds = {kind: known["count"] for kind, known in found["left_out"].items()}
    assert sum(kinds.values()) == made.defects.total() - no_evidence
    said = run(made.path, tmp_path / "out.jsonl")
    assert "left out" in said.stdout
    assert "dirty.jsonl:2: field 'image': image not found" in said.stdout


def test_what_others_wrote_is_not_replaced(folder):
    path, out = write(folder / "data.jsonl", ROW), folder / "out.jsonl"
    out.write_text("mine")
    before = content(folder)
    done = run(path, out)
    assert (done.exit_code, done.stdout) == (2, "")
    assert "take another name, or replace it with --force" in done.stderr
    assert content(folder) == before
    assert run(path, out, "--force").exit_code == 0
    write(path, ROW, ROW)  # the data have changed: what it wrote itself is replaced
    assert run(path, out).exit_code == 0
    assert len(out.read_text().splitlines()) == 2
    out.write_text(out.read_text() + "\n")  # and a person's change is not
    assert run(path, out).exit_code == 2


def as_parquet(folder, rows):
    table = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{**row, "image": {"bytes": picture(), "path": "full.png"}} for row in rows]
    table.write_table(pyarrow.Table.from_pylist(rows), folder / "data.parquet")
    return folder / "data.parquet"


def as_csv(folder, rows):
    with (folder / "data.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows({**row, "boxes": json.dumps(row["boxes"])} for row in rows)
    return folder / "data.csv"


def as_zip(folder, rows):
    (folder / "packed").mkdir()
    with zipfile.ZipFile(folder / "packed" / "images.zip", "w") as archive:
        archive.write(folder / "full.png", "full.png")
    return write(folder / "packed" / "data.jsonl", *rows)


def as_array(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize("written", [as_parquet, as_csv, as_zip, as_array])
def test_any_table(folder, written):
    """A picture in several rows is written once."""
    rows = [{"id": name, **ROW, "answer": name} for name in ("one", "two")]
    path, out = written(folder, rows), folder / "out" / "rows.jsonl"
    before = open_data(str(path))
    embedded = written in (as_parquet, as_zip)
    assert converted(path, out).pictures == embedded
    same(before, open_data(str(out)))
    first = content(folder)
    assert converted(path, out).written == converted(out, out).written == 2
    assert content(folder) == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.jsonl", "out.jsonl"], "data file not found: nowhere.jsonl"),
        (["data.jsonl", "out.parquet"], "rows are written as JSON lines; name it out.jsonl"),
        (["data.jsonl", "full.jsonl"], "'full.jsonl' is not a file; take another name"),
        (["data.jsonl"], "Missing argument 'OUT'"),
        (["data.jsonl", "out.jsonl", "--images", "move"], "'move' is not one of"),
        (["data.jsonl", "out.jsonl"], "no usable row of 1; nothing was written"),
    ],
)
def test_a_mistake_is_one_line(folder, monkeypatch, arguments, said):
    monkeypatch.chdir(folder)
    write(folder / "data.jsonl", {"image": "gone.png", "question": "What?"})
    (folder / "full.jsonl").mkdir()
    before = content(folder)
    done = run(*arguments)
    assert done.exit_code == 2
    assert said in done.stderr.splitlines()[-1]
    assert content(folder) == before


@pytest.mark.parametrize("name", ["~home.png", "a b.png", "data:image.png", "ü中.png", "A" * 60])
def test_paths_are_read_as_they_are_written(folder, name):
    (folder / name).write_bytes(picture())
    path = write(
        folder / "data.jsonl",
        ROW | {"image": f"./{name}"},
    )
    assert converted(path, folder / "out.jsonl").written == 1
    (found,) = open_data(str(folder / "out.jsonl"))
    assert os.path.samefile(found.images[0], folder / name)


def test_names_that_are_not_utf_8_are_copied(folder):
    odd = os.fsdecode(b"\xff.png")
    (folder / "odd").mkdir()
    (folder / "odd" / odd).write_bytes(picture())
    from opd.data.convert import Beside

    beside = Beside(folder / "out.jsonl", False)
    assert beside.path(folder / "odd" / odd).startswith("out-images/")
    assert beside.path(folder / "full.png") == "full.png"


def test_links_and_folders_above(folder):
    """`..` of a linked folder is that of the folder it leads to."""
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "link").symlink_to(folder / "deep" / "er")
    path = write(folder / "data.jsonl", ROW)
    for out in (folder / "link" / "out.jsonl", folder / "link" / ".." / "up.jsonl"):
        assert converted(path, out).written == 1
        (found,) = open_data(str(out))
        assert os.path.samefile(found.images[0], folder / "full.png")


def test_the_embedded_task(tmp_path, monkeypatch):
    """Pictures in memory are written as PNG."""
    from opd.tiny import Scenes

    scenes = open_every("tiny", DataOptions(), Quiet())
    few = replace(scenes, count=3)
    assert convert(few, tmp_path / "tiny.jsonl", Quiet()).pictures == 3
    same(list(Scenes("train", 3)), open_data(str(tmp_path / "tiny.jsonl")))


def test_a_full_disk_leaves_what_was_there(folder, monkeypatch):
    path, out = write(folder / "data.jsonl", ROW), folder / "out.jsonl"
    converted(path, out)
    before = content(folder)
    write(path, ROW, ROW)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("opd.data.convert.os.replace", full)
    done = run(path, out)
    assert done.exit_code == 1
    assert "cannot be written: No space left on device" in done.stderr
    assert content(folder) | {"data.jsonl": b""} == before | {"data.jsonl": b""}


def test_pictures_of_an_unpacked_archive_are_written_beside(folder, monkeypatch):
    """The cache, in which they lie, may be emptied at any time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    data = folder / "rows" / "data.jsonl"
    data.parent.mkdir()
    write(data, {"image": "inside/a.png", "question": "?", "boxes": [[1, 1, 9, 9]]})
    picture = folder / "a.png"
    Image.new("RGB", (20, 20), "red").save(picture)
    with tarfile.open(data.parent / "pictures.tar.gz", "w:gz") as archive:
        archive.add(picture, "inside/a.png")
    out = folder / "own" / "rows.jsonl"
    converted(data, out)
    (name,) = [json.loads(line)["image"] for line in out.read_text().splitlines()]
    assert name.startswith("rows-images/")
    assert (out.parent / name).read_bytes() == picture.read_bytes()
