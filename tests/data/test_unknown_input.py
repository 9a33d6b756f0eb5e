"""Fields, headers and whole formats that nobody reads are told: nothing that a person wrote is lost
without a word."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from opd.data import read_dataset
from opd.errors import DataError
from opd.progress import Quiet
from opd.run import recipe as recipes
from opd.run.session import held_out
from opd.types import Box
from opd_cli import main

ROW = {"image": "a.png", "question": "Which colour?", "boxes": [[10, 20, 30, 40]], "answer": "red"}
PER_MILLE = (Box(20, 20, 60, 40),)
"""The same box in thousandths of 2000 x 1000 pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    Image.new("RGB", (2000, 1000), "red").save(folder / "a.png")
    return folder


def write(folder: Path, *rows: Any, name: str = "data.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows),
        encoding="utf-8",
    )
    return path


def refused(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_dataset(path)
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    return said


def test_a_header_states_the_unit_and_may_hold_notes(folder: Path) -> None:
    data = read_dataset(
        write(folder, {"box_format": "per-mille", "source": "export 2026", "licence": None}, ROW)
    )
    assert data[0].boxes == PER_MILLE
    assert [note.partition("data.jsonl")[2] for note in data.notes] == [
        ":1: field 'source' of the header is not known, and not read",
        ":1: field 'licence' of the header is not known, and not read",
    ]
    assert read_dataset(write(folder, {"box_format": "per-mille"}, ROW)).notes == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"box_fromat": "per-mille"}, ROW],
            ":1: field 'box_fromat' of the header is not known; did you mean 'box_format'?",
        ),
        (
            [{"Box_Format": "per-mille"}, ROW],
            ":1: field 'Box_Format' of the header is not known; did you mean 'box_format'?",
        ),
        ([{"box-format": "per-mille"}, ROW], ":1: field 'box-format' of the header"),
        ([{"coordinate_system": "per-mille"}, ROW], ":1: field 'coordinate_system' of the header"),
        ([{"units": "per-mille"}, ROW], ":1: field 'units' of the header"),
        ([{"normalized": True}, ROW], ":1: field 'normalized' of the header"),
        (
            [ROW, {"box_format": "per-mille"}, ROW],
            ":2: a header stands in the first line only; give each row its own 'box_format'",
        ),
        (
            [ROW, ROW, {"box_fromat": "per-mille"}],
            ":3: field 'box_fromat' of the header is not known",
        ),
        (
            [{"source": "export 2026"}, ROW],
            ":1: this line is neither a row, which has image and question, nor a header",
        ),
        ([{"box_format": "pixels", "weight": 0.5}, ROW], ":1: field 'weight' stands in the header"),
        (
            [{"box_format": "pixels", "image_root": "x"}, ROW],
            ":1: field 'image_root' stands in the header",
        ),
        (["{'box_format': 'per-mille'}", ROW], ":1: not JSON: "),
        ([ROW, "{'box_fromat': 'per-mille'}"], ":2: not JSON: "),
        (
            [{**ROW, "box_fromat": "per-mille"}],
            ":1: field 'box_fromat' is not known; did you mean 'box_format'?",
        ),
        (
            [ROW, {**ROW, "bbox_format": "per-mille"}],
            ":2: field 'bbox_format' is not known; did you mean 'box_format'?",
        ),
        (
            [{**ROW, "boxformat": "per-mille"}],
            ":1: field 'boxformat' is not known; did you mean 'box_format'?",
        ),
        ([{**ROW, "boxFormat": "per-mille"}], ":1: field 'boxFormat' is not known"),
        ([{**ROW, "coordinate_format": "per-mille"}], ":1: field 'coordinate_format' is not known"),
        ([{**ROW, "bbox_type": "norm1"}], ":1: field 'bbox_type' is not known"),
        (
            [{**ROW, "format": "xywh"}],
            ":1: field 'format' is not known; did you mean 'box_format'?",
        ),
        (
            [{**ROW, "boxes": [{"box": [1, 2, 3, 4], "format": "xywh"}]}],
            ":1: field 'boxes': a box has no field 'format'; give the row a",
        ),
    ],
)
def test_a_unit_of_boxes_that_is_not_understood_is_fatal(
    folder: Path, rows: list[Any], message: str
) -> None:
    path = write(folder, *rows)
    assert refused(path).startswith(f"{path}{message}")


def test_a_line_of_neither_kind_among_rows_is_a_faulty_row(folder: Path) -> None:
    """Only a first line, or one that seems to state a unit of boxes, can be a header."""
    data = read_dataset(write(folder, ROW, {"error": "download failed"}, {}, ROW))
    assert [source for source, _ in data.skipped] == ["data.jsonl:2", "data.jsonl:3"]
    assert "field 'image' is missing" in data.skipped[0][1]
    misspelt = {"imgae": "a.png", "qestion": "?", "note": 1}
    assert "did you mean 'image'?" in refused(write(folder, misspelt, misspelt))


def test_fields_that_are_not_known_are_told_once_with_the_nearest(folder: Path) -> None:
    misspelt = {
        **ROW,
        "wieght": 0.0,
        "choises": ["red", "blue"],
        "anwser": "red",
        "teacher_qestion": "x",
    }
    data = read_dataset(
        write(
            folder,
            misspelt,
            {**misspelt, "bbox": [1, 2, 3, 4]},
            {**ROW, "wieght": 1, "anwser": None, "note": "n"},
        )
    )
    assert len(data) == 3
    assert data.notes == [
        "field 'wieght' (3 rows) is not known; did you mean 'weight'?",
        "field 'choises' (2 rows) is not known; did you mean 'choices'?",
        "field 'anwser' (2 rows) is not known; did you mean 'answer'?",
        "field 'teacher_qestion' (2 rows) is not known; did you mean 'teacher_question'?",
        "field 'bbox' (1 row) is not known; did you mean 'boxes'?",
        "not known, and not read: field 'note' (1 row)",
    ]


def test_fields_of_a_persons_own_are_told_in_one_line(folder: Path) -> None:
    extra = {
        "category": "fraction",
        "height": 3,
        "box_count": 2,
        "box_labels": ["x"],
        "format": "jpeg",
        "type": "choice",
    }
    boxes = [{"box": [10, 20, 30, 40], "label": "cat"}]
    data = read_dataset(
        write(
            folder,
            {**ROW, **extra, "boxes": boxes, **{f"column {number}": 1 for number in range(30)}},
        )
    )
    assert data[0].boxes == (Box(10, 20, 30, 40),)
    others = data.notes[-1]
    assert others.startswith(
        "not known, and not read: fields 'category' (1 row), 'height' (1 row), 'box_count' (1 row)"
    )
    assert others.endswith(" more")
    assert len(data.notes) <= 4
    assert max(map(len, data.notes)) < 600


@pytest.mark.parametrize("name", ["img", "image_id", "imgae"])
def test_a_box_with_a_misspelt_image_is_a_faulty_row(folder: Path, name: str) -> None:
    data = read_dataset(write(folder, ROW, {**ROW, "boxes": [{name: 1, "box": [10, 20, 30, 40]}]}))
    assert [reason for _, reason in data.skipped] == [
        f"field 'boxes': a box has no field '{name}'; did you mean 'image'?"
    ]


def test_a_field_that_stands_twice_is_a_faulty_row(folder: Path) -> None:
    twice = '{"image": "a.png", "image": "b.png", "question": "?", "boxes": [[10, 20, 30, 40]]}'
    data = read_dataset(
        write(
            folder,
            ROW,
            twice,
            '{"box_format": "pixels", "box_format": "fraction", "image": "a.png", "question": "?"}',
        )
    )
    assert [reason for _, reason in data.skipped] == [
        "field 'image' stands twice in the row",
        "field 'box_format' stands twice in the row",
    ]


MESSAGES = [{"role": "user", "content": "<image>x"}]


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (
            {"problem": "<image>x", "answer": "C", "images": ["a.png"]},
            "Vision-OPD-6K or ZwZ-RL-VQA (field 'problem') without 'bbox'",
        ),
        ({"prompt": MESSAGES}, "TRL's prompts (field 'prompt') without 'images'"),
        ({"annotations": []}, "COCO's annotations (field 'annotations') without 'images'"),
        (
            {"query": "?", "response": "x"},
            "ZoomBench (fields 'query' and 'response') without 'image'",
        ),
    ],
)
def test_a_format_of_others_is_named(folder: Path, row: dict[str, Any], name: str) -> None:
    said = refused(write(folder, row, row))
    assert (
        f"no usable row of 2; the first fault, in data.jsonl:1: this looks like {name}; write its"
        " rows as opd reads them" in said
    )
    assert "docs/data.md" in said
    assert "did you mean" not in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": MESSAGES, "images": ["a.png"], "objects": {"bbox": []}},
            "field 'objects.bbox' is missing",
        ),
        ({"messages": MESSAGES}, "field 'image' is missing"),
        (
            {"id": "1", "image": "a.png", "conversations": [{"from": "human", "value": "x"}]},
            "field 'boxes' is missing: the evidence",
        ),
        ({"prompt": MESSAGES, "images": ["a.png"]}, "field 'boxes' is missing"),
        ({"image": "a.png", "query": "?", "response": "x"}, "field 'boxes' is missing"),
    ],
)
def test_rows_of_others_lack_evidence(folder: Path, row: dict[str, Any], message: str) -> None:
    said = refused(write(folder, row, row))
    assert f"no usable row of 2; the first fault, in data.jsonl:1: {message}" in said
    data = read_dataset(write(folder, ROW, ROW, row))
    assert data.skipped[0][0] == "data.jsonl:3"


def test_a_row_of_ours_may_hold_columns_of_others(folder: Path) -> None:
    data = read_dataset(write(folder, {**ROW, "messages": MESSAGES, "problem": "x"}))
    assert data.notes == ["not known, and not read: fields 'messages' (1 row), 'problem' (1 row)"]


LINE = json.dumps(ROW)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINE.encode("utf-16"), "the file is UTF-16 text; save it as UTF-8"),
        ("a.jsonl", LINE.encode("utf-16-be"), "the file is UTF-16 text; save it as UTF-8"),
        ("a.jsonl", LINE.encode("utf-32"), "the file is UTF-32 text; save it as UTF-8"),
        ("a.jsonl", LINE.encode() + b"\0\0", "the file is binary, not JSON lines in UTF-8"),
        ("a.csv", LINE.encode("utf-16"), "the file is UTF-16 text; save it as UTF-8"),
        ("a.parquet", b"PAR1\0\0PAR1", "the file is damaged Parquet: "),
        ("a.jsonl.gz", b"\x1f\x8b\x08\0", "the file is damaged gzip: "),
        ("a.csv", b"image,image,question\nx,y,z\n", "column 'image' stands 2 times in the header"),
        ("a.csv", b"image,question\n", "the file has a header and no rows"),
        (
            "a.json",
            json.dumps({"rows": [ROW], "more": [ROW]}, indent=2).encode(),
            "the file is one JSON object (of 'rows', 'more'), which holds 2 lists of rows",
        ),
    ],
)
def test_a_file_of_another_kind_is_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert refused(tmp_path / name).startswith(f"{tmp_path / name}: {message}")


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read(folder: Path, indent: int | None) -> None:
    (folder / "a.json").write_text(
        json.dumps([{"box_format": "per-mille"}, ROW, {**ROW, "question": 5}], indent=indent)
    )
    data = read_dataset(folder / "a.json")
    assert (data[0].boxes, data[0].source) == (PER_MILLE, "a.json:2")
    assert [source for source, _ in data.skipped] == ["a.json:3"]


@pytest.mark.parametrize("indent", [None, 2])
def test_the_one_list_of_rows_in_a_json_object_is_read(folder: Path, indent: int | None) -> None:
    whole = {"version": 3, "tags": ["x"], "rows": [ROW, {**ROW, "question": 5}]}
    (folder / "a.json").write_text(json.dumps(whole, indent=indent))
    data = read_dataset(folder / "a.json")
    assert [example.source for example in data] == ["a.json:1"]
    assert [source for source, _ in data.skipped] == ["a.json:2"]


PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(3_000_000)).decode()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"image": PICTURE},
            "field 'image': image cannot be read: data.jsonl:1 image: not an image",
        ),
        ({"image": f"data:image/jpeg;base64,{PICTURE}"}, "data.jsonl:1 image: not an image"),
        ({"image": base64.b64encode(bytes(1000)).decode()}, "data.jsonl:1 image: not an image"),
        ({"image": None, "images": [PICTURE, "a.png"]}, "data.jsonl:1 images[0]: not an image"),
        ({"teacher_image": PICTURE[:100]}, "data.jsonl:1 teacher_image: not an image"),
        ({"image": {"bytes": PICTURE, "path": None}}, "data.jsonl:1 image: not an image"),
        (
            {"image": "https://example.org/a.png"},
            "field 'image': \"https://example.org/a.png\" is a URL; download the picture",
        ),
        ({"image": "x/" * 5000 + "a.png"}, "field 'image': image "),
        ({"image": "x" * 300 + ".png"}, "field 'image': image "),
        ({"image": "a\0.png"}, "field 'image': image not found: "),
        ({"question": ["x" * 3_000_000]}, "field 'question': "),
        ({"boxes": {"x" * 3_000_000: 1}}, "field 'boxes': "),
        ({"answer": {"x": "y" * 3_000_000}}, "field 'answer': "),
    ],
    ids=lambda value: str(value)[:40],
)
def test_pictures_in_rows_and_long_values_are_told_in_one_short_line(
    folder: Path, fields: dict[str, Any], message: str
) -> None:
    said = refused(write(folder, {**ROW, **fields}))
    assert message in said


@pytest.mark.parametrize(
    "fields",
    [
        {"question": "What \ud83d is it?"},
        {"answer": "\udc80"},
        {"answer": ["red", "\udc80"]},
        {"choices": ["red", "\ud83d"]},
        {"id": "\ud83d"},
        {"teacher_question": "\udfff"},
        {"image": "\ud83d.png"},
        {"box_format": "\ud83d"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_half_a_character_is_a_faulty_row(folder: Path, fields: dict[str, Any]) -> None:
    """JSON can write a lone surrogate, which no file and no tokenizer takes; messages show it as an
    escape."""
    data = read_dataset(write(folder, ROW, {**ROW, **fields}))
    ((source, reason),) = data.skipped
    assert source == "data.jsonl:2"
    assert reason.encode()
    assert f"field '{next(iter(fields))}': " in reason
    noted = read_dataset(write(folder, {**ROW, "\ud83d": 1}))
    assert noted.notes == ["not known, and not read: field '\\ud83d' (1 row)"]


def test_control_characters_are_text(folder: Path) -> None:
    (one,) = read_dataset(write(folder, {**ROW, "question": "a\0b\x1b[31m", "answer": "\0x"}))
    assert (one.question, one.answer) == ("a\0b\x1b[31m", "\0x")


def test_a_path_may_begin_at_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (one,) = read_dataset(write(folder, {**ROW, "image": "~/a.png"}), strict=True)
    assert one.images == (folder / "a.png",)
    Image.new("RGB", (50, 50)).save(folder / "~b.png")
    (one,) = read_dataset(write(folder, {**ROW, "image": "~b.png"}), strict=True)
    assert one.images == (folder / "~b.png",)


@pytest.mark.parametrize(
    "rows",
    [
        [{"box_fromat": "per-mille"}, ROW],
        [{**ROW, "bbox_format": "per-mille"}],
        [ROW, {"box_format": "per-mille"}],
        [{"messages": MESSAGES}],
    ],
    ids=["header", "row", "header below", "format"],
)
def test_the_command_refuses_in_one_line(
    folder: Path, rows: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = write(folder, *rows)
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(main, ["train", "--backend", "cpu", "--data", path.name])
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert "data.jsonl:" in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_few_rows_are_opened_for_measuring_and_are_those_of_training(folder: Path) -> None:
    path = write(
        folder,
        *({**ROW, "id": number, "image": "a.png" if number else "b.png"} for number in range(9)),
    )
    recipe = recipes.load("tiny", [f"data.path={path}", "measure.count=3"])
    few, whole = held_out(recipe, None), held_out(recipe, read_dataset(path))
    assert [one.id for one in few] == [one.id for one in whole] == ["1", "3", "6"]
    notes = Notes()
    elsewhere = recipes.load("tiny", [f"measure.path={path}", "measure.count=3"])
    assert [one.id for one in held_out(elsewhere, [], notes)] == ["1", "3", "6"]
    assert [note.partition(":")[0] for note in notes.lines] == ["skipped data.jsonl"]


class Notes(Quiet):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, message: str) -> None:
        self.lines.append(message)
