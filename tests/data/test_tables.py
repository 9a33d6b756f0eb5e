"""Tables: the same rows in every kind of file, and files that are damaged or of several kinds."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import sys
import threading
import tracemalloc
from datetime import date
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from opd.data import open_data, read_dataset
from opd.data.images import open_image
from opd.data.reading import AS_IT_IS, Reading
from opd.data.tables import hub, open_table, parquet, spans
from opd.data.tables import table as tables
from opd.errors import DataError
from opd.progress import Quiet
from opd.types import Box

ROWS = [
    {
        "image": f"{name}.png",
        "question": f'Which, "{name}"\nor; none?\t',
        "boxes": [[10, 20, 30, 40 + place]],
        "answer": "red",
        "choices": ["red", "dark blue"],
        "id": name,
        "weight": 0.5,
    }
    for place, name in enumerate("abcde")
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = tmp_path / "data"
    data.mkdir()
    for name in "abcde":
        Image.linear_gradient("L").resize((200, 100)).save(data / f"{name}.png")
    return data


def table(path, **said):
    return open_table(path, Reading(**said), Quiet())


def refused(path, **said):
    with pytest.raises(DataError) as caught:
        read_dataset(path, reading=Reading(**said))
    said = str(caught.value)
    assert "\n" not in said
    assert len(said) < 600
    return said


def text(row):
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in row.items()
    }


def write(path, rows):
    """Writes rows as the name of the file says."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif name.endswith((".csv", ".tsv")):
        with path.open("w", newline="", encoding="utf-8") as file:
            sign = "\t" if name.endswith(".tsv") else ";" if "semicolon" in name else ","
            table = csv.DictWriter(file, list(rows[0]), delimiter=sign)
            table.writeheader()
            table.writerows(map(text, rows))
    elif name.endswith(".json"):
        path.write_text(json.dumps({"rows": rows} if "object" in name else rows))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    if path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


NAMES = (
    "rows.jsonl rows.json object.json rows.parquet rows.csv semicolon.csv rows.tsv rows.jsonl.gz"
    " rows.csv.gz rows.parquet.gz"
).split()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_every_kind_of_file_are_the_same_examples(folder, name):
    data = read_dataset(write(folder / name, ROWS))
    expected = read_dataset(write(folder / "expected.jsonl", ROWS))
    assert data.skipped == []
    for one, other in zip(data, expected, strict=True):
        assert {**vars(one), "source": ""} == {**vars(other), "source": ""}
    assert data[4].boxes == (Box(10, 20, 30, 44),)
    assert data[0].source.startswith(f"{name}:")
    shown = [note for note in data.notes if "read as" in note]
    kept = name.removesuffix(".gz").endswith((".jsonl", ".json"))
    assert shown == ([] if kept else [f"{folder / name}: read as opd's own rows: 5 rows"])
    assert len(data.fingerprint) == 64
    assert read_dataset(folder / name).fingerprint == data.fingerprint


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet"])
def test_rows_are_read_by_several_threads_in_any_order(folder, name):
    rows = [{**ROWS[0], "id": str(place)} for place in range(200)]
    read = table(write(folder / name, rows))
    assert len(read) == 200
    wrong = []

    def work(start):
        for step in range(200):
            place = (start + 7 * step) % 200
            if read.row(place)["id"] != str(place):
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_lines_are_found_across_chunks_and_their_numbers_told(folder, monkeypatch):
    lines = ["", '{"a": 1}', "  ", '  {"b": "é\u3000"}\r', "\u3000", '{"c": 3}', ""]
    content = "\ufeff" + "\n".join(lines)
    path = folder / "rows.jsonl"
    path.write_bytes(content.encode())
    for size in (1, 2, 3, 7, 8, 64, 1 << 22):
        monkeypatch.setattr(spans, "CHUNK", size)
        found = table(path)
        assert [found.number(place) for place in range(len(found))] == [2, 4, 6]
        assert [found.row(place) for place in range(3)] == [{"a": 1}, {"b": "é\u3000"}, {"c": 3}]


@settings(max_examples=200, deadline=None)
@given(content=st.text(alphabet='a\n\r "{},é\u2028\ufeff\t', max_size=60), size=st.integers(1, 9))
def test_lines_are_those_of_the_whole_text(tmp_path_factory, content, size):
    path = tmp_path_factory.mktemp("lines") / "rows.jsonl"
    path.write_bytes(content.encode())
    expected = [
        (number, line)
        for number, line in enumerate(content.removeprefix("\ufeff").split("\n"), start=1)
        if line.strip()
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(spans, "CHUNK", size)
        found = spans.lines(path)
    got = [(found.number(place), found.read(place).decode()) for place in range(len(found))]
    assert got == expected


CELL = st.text(alphabet='ab,;"\n\r\té |', max_size=6)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(CELL, CELL, CELL), min_size=1, max_size=6))
def test_what_the_csv_module_writes_is_read_again(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("cells") / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows([("x", "y", "z"), *rows])
    found = table(path)
    got = [tuple(found.row(place).values()) for place in range(len(found))]
    assert got == [tuple(cell or None for cell in row) for row in rows]


@settings(max_examples=300, deadline=None)
@given(content=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.csv", "a.jsonl", "a.json", "a.parquet", "a.gz"):
        (folder / name).write_bytes(content)
        said = []
        try:
            found = table(folder / name)
            for place in range(len(found)):
                try:
                    found.row(place)
                except DataError as error:
                    said.append(str(error))
        except DataError as error:
            said.append(str(error))
        assert not [line for line in said if "\n" in line or len(line) > 600]


def test_ragged_rows_and_quotation_marks(folder):
    path = folder / "rows.csv"
    lines = [
        "image,question,boxes",
        'a.png,"What, then?","[[10, 20, 30, 40]]"',
        "a.png,Short",
        'b.png,A 5" pipe?,"[[10,20,30,40]]",,',
        "c.png,x,[1],more",
        '"d.png,never closed,"[[10, 20, 30, 40]]"',
        'e.png,"two\nlines","[[10, 20, 30, 40]]"',
    ]
    path.write_text("\n".join(lines))
    data = read_dataset(path)
    assert [(one.source, one.question) for one in data] == [
        ("rows.csv:2", "What, then?"),
        ("rows.csv:4", 'A 5" pipe?'),
        ("rows.csv:7", "two\nlines"),
    ]
    faults = dict(data.skipped)
    assert list(faults) == ["rows.csv:3", "rows.csv:5", "rows.csv:6"]
    assert faults["rows.csv:3"].startswith("2 cells for 3 columns; a cell with a separator")
    assert faults["rows.csv:5"].startswith("4 cells for 3 columns")


def test_columns_that_nobody_knows(folder):
    path = write(folder / "rows.csv", [{"a": "a.png", "b": "What?", "boxes": "[[1, 2, 9, 9]]"}])
    assert refused(path) == (
        f"{path}: no column is known to hold the image and the question; say which: --set"
        " data.columns.image=COLUMN and --set data.columns.question=COLUMN (the columns are 'a',"
        " 'b', 'boxes')"
    )
    data = read_dataset(path, reading=Reading(columns={"image": "a"}, question="What?"))
    assert data[0].boxes == (Box(1, 2, 9, 9),)


def test_a_csv_file_that_is_not_utf8(folder):
    (folder / "rows.csv").write_bytes(b"image,question\na.png,caf\xe9\n")
    assert refused(folder / "rows.csv") == (
        f"{folder / 'rows.csv'}:2: the file is not UTF-8 text (byte 0xe9); save it as UTF-8"
    )


def test_tsv_with_marks_as_they_are(folder):
    path = folder / "rows.tsv"
    rows = [
        "image\tquestion\tbox_format\tboxes",
        'a.png\t"Stop" is written where?\tpixels\t[[1,2,9,9]]',
    ]
    path.write_text("\n".join([*rows, 'b.png\t"odd\t\t[[1,2,9,9]]', rows[1]]))
    data = read_dataset(path)
    assert [one.question for one in data] == [
        "Stop is written where?",
        '"odd',
        "Stop is written where?",
    ]


def test_columns_with_usual_names_are_taken_and_told(folder):
    rows = [
        {"img": "a.png", "Prompt": "What?", "bbox": [[10, 20, 30, 40]], "note": 1, "label": "x"}
    ]
    for name in ("rows.csv", "rows.parquet"):
        data = read_dataset(write(folder / name, rows))
        assert (data[0].question, data[0].answer) == ("What?", "x")
        assert data.notes[1:] == [
            "columns are read under our names: 'img' as image, 'Prompt' as question, 'bbox' as"
            " boxes, 'label' as answer",
            "not read: column 'note'",
        ]
    two = [{"image": "a.png", "prompt": "What?", "query": "Which?", "boxes": [[1, 2, 9, 9]]}]
    data = read_dataset(
        write(folder / "two.csv", two), reading=Reading(columns={"question": "query"})
    )
    assert data[0].question == "Which?"
    # JSON lines are written by people: a name that is not known is told, and never guessed.
    assert "did you mean 'image'" in refused(write(folder / "rows.jsonl", rows))


def test_two_columns_that_fit_one_field_are_told(folder):
    row = {**ROWS[1], "label": "red", "target": "blue"}
    del row["answer"], row["choices"]
    path = write(folder / "rows.csv", [row])
    data = read_dataset(path)
    assert data[0].answer is None
    said = "'label' or 'target' may be the field answer; say which: --set data.columns.answer="
    assert f"{said}COLUMN" in data.notes
    assert read_dataset(path, reading=Reading(columns={"answer": "target"}))[0].answer == "blue"


def test_columns_that_a_person_names(folder):
    rows = [{"pic": {"path": "a.png"}, "text": "no", "q": {"en": "What?"}, "where": [[1, 2, 9, 9]]}]
    columns = {"image": "pic.path", "question": "q.en", "boxes": "where"}
    for name in ("rows.jsonl", "rows.parquet"):
        data = read_dataset(write(folder / name, rows), reading=Reading(columns=columns))
        assert data[0].question == "What?"
        assert data[0].boxes == (Box(1, 2, 9, 9),)
    said = refused(folder / "rows.jsonl", columns={**columns, "boxes": "were"})
    assert said == (
        f"{folder / 'rows.jsonl'}: data.columns.boxes: there is no column 'were'; did you mean"
        " 'where'? the columns are 'pic', 'text', 'q', 'where'"
    )
    bad = write(folder / "bad.jsonl", [{**rows[0], "where": [[1, 2, 9000, 9]]}])
    assert "field 'where': box [1, 2, 9000, 9] is outside" in refused(bad, columns=columns)


def test_a_question_for_rows_that_have_none(folder):
    rows = [{"image": "a.png", "boxes": [[1, 2, 9, 9]]}, ROWS[1]]
    data = read_dataset(write(folder / "rows.jsonl", rows), reading=Reading(question="What is it?"))
    assert [one.question for one in data] == ["What is it?", ROWS[1]["question"]]


def test_rows_without_boxes(folder):
    path = write(folder / "rows.jsonl", [{"image": "a.png", "question": "What?"}, ROWS[1]])
    assert len(read_dataset(path)) == 1
    both = read_dataset(path, evidence=False)
    assert [one.boxes for one in both] == [(), (Box(10, 20, 30, 41),)]
    assert len(open_data(str(path), evidence=False)) == 2


def test_parquet_with_large_row_groups_is_copied_once(folder, monkeypatch):
    rows = [{**ROWS[0], "id": str(place)} for place in range(3000)]
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    monkeypatch.setattr(parquet, "GROUP_ROWS", 1000)
    notes = []
    progress = Quiet()
    progress.note = notes.append
    read = open_table(path, AS_IT_IS, progress)
    assert [read.row(place)["id"] for place in (0, 1024, 2999, 1)] == ["0", "1024", "2999", "1"]
    assert len(notes) == 1
    (copy,) = (folder.parent / "cache/opd/tables").glob("*.parquet")
    assert pq.ParquetFile(copy).metadata.num_row_groups > 2
    assert open_table(path, AS_IT_IS, progress).row(2999)["id"] == "2999"
    assert len(notes) == 1
    pq.write_table(pa.Table.from_pylist(rows[:1500]), path)  # another file under the name
    assert len(open_table(path, AS_IT_IS, progress)) == 1500
    assert len(notes) == 2


def test_few_row_groups_stay_in_memory(folder, monkeypatch):
    rows = [{"image": bytes(10_000), "id": str(place)} for place in range(100)]
    path = write(folder / "rows.parquet", rows)
    monkeypatch.setattr(parquet, "CACHE_BYTES", 100_000)
    read = table(path)
    for place in range(100):
        assert read.row(place)["id"] == str(place)
    assert 1 <= len(read._cache) <= 5


def test_values_of_parquet_become_plain(folder):
    row = {
        "when": date(2026, 11, 28),
        "price": Decimal("1.5"),
        "deep": [{"a": [b"\0", None]}],
        "count": 3,
    }
    schema = pa.schema([("m", pa.map_(pa.string(), pa.int64()))])
    path = folder / "a.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    assert table(path).row(0) == {
        "when": "2026-11-28",
        "price": 1.5,
        "deep": [{"a": [b"\0", None]}],
        "count": 3,
    }
    pq.write_table(pa.Table.from_pylist([{"m": [("x", 1)]}], schema), path)
    assert table(path).row(0) == {"m": {"x": 1}}


def test_damaged_parquet(folder):
    path = write(folder / "rows.parquet", [{**ROWS[0], "id": str(place)} for place in range(40)])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert refused(path).startswith(f"{path}: the file is damaged Parquet: ")
    half = len(whole) // 2
    path.write_bytes(whole[:60] + bytes(half) + whole[60 + half :])
    try:
        said = [reason for _, reason in read_dataset(path).skipped]
    except DataError as error:
        said = [str(error)]
    assert said
    assert not [line for line in said if "\n" in line]
    pq.write_table(pa.table({"image": pa.array([], pa.string())}), path)
    assert refused(path) == f"{path}: the file has no rows"


def test_without_pyarrow_the_command_is_told(folder, monkeypatch):
    path = write(folder / "rows.parquet", ROWS)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert refused(path) == (
        f"{path}: Parquet is read with pyarrow: pip install 'vision-opd[data]'"
    )


def test_a_row_that_is_too_long_is_never_read(folder, monkeypatch):
    monkeypatch.setattr(spans, "ROW_BYTES", 1000)
    path = write(folder / "rows.jsonl", [ROWS[0], {**ROWS[1], "note": "x" * 2000}])
    data = read_dataset(path)
    assert [one.id for one in data] == ["a"]
    assert data.skipped[0][1].startswith("the row has 2,")
    monkeypatch.setattr("opd.data.tables.delimited.ROW_BYTES", 1000)
    path = write(folder / "rows.csv", [{"image": "a.png", "question": "x" * 2000}])
    assert refused(path) == f"{path}:2: the line has more than 1,000 bytes"


def test_an_array_that_is_too_long_is_never_read(folder, monkeypatch):
    monkeypatch.setattr("opd.data.tables.json_lines.WHOLE_BYTES", 100)
    path = write(folder / "rows.json", ROWS)
    assert "which would fill the memory; write one row a line" in refused(path)


def test_gzip_with_something_after_it(folder):
    path = write(folder / "rows.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes() + b"more")
    assert refused(path).startswith(f"{path}: the file is damaged gzip: ")


def test_a_faulty_first_row_of_a_table_is_one_faulty_row(folder):
    path = folder / "rows.csv"
    path.write_text('image,question,boxes,x\na.png,What\na.png,What?,"[[1,2,9,9]]",1\n')
    data = read_dataset(path)
    assert [one.source for one in data] == ["rows.csv:3"]
    assert [source for source, _ in data.skipped] == ["rows.csv:2"]
    assert "not read: column 'x'" in data.notes
    path.write_text("image,question,bbox_format\na.png\na.png,What?,xywh\n")
    assert "rows.csv:3: field 'bbox_format' is not known" in refused(path)


def test_old_line_ends_and_pointers(folder):
    path = folder / "rows.csv"
    path.write_bytes(b"image,question\ra.png,What?\r")
    assert refused(path).startswith(f"{path}: the header is not a record of cells: new-line")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 3\n")
    assert refused(path).endswith(
        "is a pointer of Git LFS and not the file; fetch it: git lfs pull"
    )


def test_cut_gzip(folder):
    path = write(folder / "rows.jsonl.gz", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    assert refused(path).startswith(f"{path}: the file is damaged gzip: ")
    assert not [*(folder.parent / "cache/opd/tables").glob("partial*")]
    path.write_bytes(gzip.compress(b"\xff\xfe{}"))
    assert refused(path) == f"{path}: the file is UTF-16 text; save it as UTF-8"


def test_a_bomb_of_gzip_stops_where_the_disk_would_be_full(folder, monkeypatch):
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(bytes(50_000_000)))
    usage = type("Usage", (), {"free": (1 << 30) + 1000})
    monkeypatch.setattr("opd.data.tables.kept.shutil.disk_usage", lambda _: usage)
    assert "for which" in refused(path)
    assert not [*(folder.parent / "cache/opd/tables").glob("*partial*")]


def test_pipes_are_not_read(folder):
    os.mkfifo(folder / "rows.jsonl")
    assert "it is a pipe or a device" in refused(folder / "rows.jsonl")


class TestFolders:
    def test_the_one_data_file_is_read(self, folder):
        write(folder / "rows.jsonl", ROWS)
        (folder / "README.md").write_text("x")
        (folder / ".rows.jsonl.opd-pictures").write_text("{}")
        (folder / "dataset_infos.json").write_text("{}")
        data = read_dataset(folder)
        assert [one.source for one in data] == [f"rows.jsonl:{n}" for n in range(1, 6)]
        assert data[0].images == (folder / "a.png",)

    def test_parts_are_one_table_in_the_order_of_their_numbers(self, folder):
        for number, row in enumerate(ROWS):
            write(folder / f"train-{number * 3}-of-99.parquet", [row, row])
        data = read_dataset(folder)
        assert [one.id for one in data] == list("aabbccddee")
        assert data[8].source == "train-12-of-99.parquet:1"
        assert len(read_dataset(folder, count=3)) == 3
        before = data.fingerprint
        write(folder / "train-12-of-99.parquet", [ROWS[4], ROWS[3]])
        assert read_dataset(folder).fingerprint != before
        write(folder / "train-1-of-99.parquet", [{"image": "a.png"}])
        assert "have different columns; name one of them" in refused(folder)

    def test_splits(self, folder):
        (folder / "data").mkdir()
        for name in "ab":
            (folder / f"{name}.png").rename(folder / "data" / f"{name}.png")
        write(folder / "data/train-00000-of-00002.jsonl", ROWS[:1])
        write(folder / "data/train-00001-of-00002.jsonl", ROWS[1:2])
        write(folder / "data/test-00000-of-00001.jsonl", ROWS[:1])
        said = refused(folder)
        assert said == (
            f"{folder} holds several data files: data/test-00000-of-00001.jsonl,"
            " data/train-00000-of-00002.jsonl (of 2 parts); name one of them, or a split with"
            " data.split"
        )
        assert [one.id for one in read_dataset(folder, reading=Reading(split="train"))] == [
            "a",
            "b",
        ]
        assert len(read_dataset(folder, reading=Reading(split="test"))) == 1
        assert "no file of the split 'dev'; there are data/test" in refused(folder, split="dev")

    def test_pictures_with_a_json_file_each(self, folder):
        (folder / "inner").mkdir()
        for name in "ab":
            (folder / f"{name}.png").rename(folder / "inner" / f"{name}.png")
            row = {**ROWS[0], "image": "elsewhere.png"}
            del row["id"]
            (folder / "inner" / f"{name}.json").write_text(json.dumps(row))
        (folder / "c.json").write_text("{")
        (folder / "inner" / "circle").symlink_to(folder)
        data = read_dataset(folder)
        assert [one.id for one in data] == ["inner/a.png", "inner/b.png"]
        assert data[0].images == (folder / "inner/a.png",)
        assert data[0].source == f"{folder.name}/inner/a.json"
        assert data.skipped[0][0] == f"{folder.name}/c.json"
        assert data.skipped[0][1].startswith("not JSON: ")

    def test_a_folder_without_data(self, folder):
        assert refused(folder).startswith(f"{folder} is a folder without data: it holds no file")
        (folder / "loop").symlink_to(folder / "loop")
        (folder / "none").mkdir()
        assert "is a folder without data" in refused(folder)

    def test_two_kinds_of_files(self, folder):
        write(folder / "rows.jsonl", ROWS)
        write(folder / "rows.csv", ROWS)
        assert "holds several data files: rows.csv, rows.jsonl; name one" in refused(folder)


def test_tables_hold_an_index_alone(folder):
    """No row stays in memory: the table of a file of 20 MB takes less than one."""
    path = folder / "rows.jsonl"
    line = json.dumps({**ROWS[0], "note": "x" * 2000})
    path.write_text(f"{line}\n" * 10_000)
    table(path)
    tracemalloc.start()
    found = table(path)
    for place in range(0, 10_000, 10):
        found.row(place)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_000_000
    assert tables.CHECKED == 2048


class TestArchives:
    @pytest.mark.parametrize("name", ["all.zip", "all.tar", "all.tar.gz"])
    def test_rows_and_pictures_in_one_archive(self, folder, name):
        expected = list(read_dataset(write(folder / "rows.jsonl", ROWS)))
        target = folder.parent / "other"
        target.mkdir()
        kind = {"all.zip": "zip", "all.tar": "tar", "all.tar.gz": "gztar"}[name]
        shutil.make_archive(str(target / "all"), kind, folder)
        shutil.rmtree(folder)
        data = read_dataset(target / name)
        assert data.skipped == []
        assert [(one.id, one.question, one.boxes) for one in data] == [
            (one.id, one.question, one.boxes) for one in expected
        ]
        assert [open_image(one.images[0]).size for one in data] == [(200, 100)] * 5
        assert read_dataset(target).fingerprint == data.fingerprint  # it is all that is there
        assert read_dataset(target / name).fingerprint == data.fingerprint

    def test_archives_that_hold_no_rows_or_several_files(self, folder):
        shutil.make_archive(str(folder.parent / "none"), "zip", folder)
        path = folder.parent / "none.zip"
        assert "none.zip holds no data file; unpack it, and name the file" in refused(path)
        write(folder / "a.jsonl", ROWS)
        write(folder / "b.csv", ROWS)
        shutil.make_archive(str(folder.parent / "two"), "zip", folder)
        said = refused(folder.parent / "two.zip")
        assert "two.zip holds several data files: a.jsonl, b.csv; unpack it" in said
        path.write_bytes(path.read_bytes()[:-30])
        assert "\n" not in refused(path)
        (folder / "c.zip").write_bytes(b"PK\x03\x04")
        assert "\n" not in refused(folder / "c.zip")


class TestHub:
    """`datasets` reads local folders by the code that reads data sets of the Hub."""

    @pytest.fixture
    def saved(self, folder, monkeypatch):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder.parent / "hf"))
        buffers = {name: (folder / f"{name}.png").read_bytes() for name in "abcde"}
        rows = [{**row, "image": {"bytes": buffers[row["id"]], "path": None}} for row in ROWS]
        features = datasets.Features(
            {
                "image": datasets.Image(),
                "question": datasets.Value("string"),
                "boxes": datasets.List(datasets.List(datasets.Value("int64"))),
                "answer": datasets.Value("string"),
                "id": datasets.Value("string"),
            }
        )
        rows = [{name: row[name] for name in features} for row in rows]
        split = datasets.Dataset.from_list(rows, features)
        both = datasets.DatasetDict({"train": split, "test": split.select([0])})
        return folder, both

    def test_a_saved_data_set(self, saved):
        folder, both = saved
        both.save_to_disk(folder / "saved")
        data = read_dataset(folder / "saved")
        assert data.notes[:2] == [
            f"{folder / 'saved'}: its split train is read; data.split names another: test",
            f"{folder / 'saved'}: read as opd's own rows: 5 rows",
        ]
        assert [one.id for one in data] == list("abcde")
        assert open_image(data[3].images[0]).size == (200, 100)
        assert len(read_dataset(folder / "saved", reading=Reading(split="test"))) == 1
        said = refused(folder / "saved", split="tset")
        assert said == f"{folder / 'saved'}: data.split = 'tset': unknown; did you mean 'test'?"
        both["train"].save_to_disk(folder / "one")
        assert len(read_dataset(folder / "one")) == 5

    def test_the_loading_of_the_hub(self, saved):
        folder, both = saved
        (folder / "local").mkdir()
        both["train"].to_parquet(folder / "local" / "train.parquet")
        both["test"].to_parquet(folder / "local" / "test.parquet")
        found = hub.open_hub(folder / "local", "", "", Quiet())
        assert (len(found), found.kind) == (5, "a Hugging Face data set")
        assert found.row(1)["image"]["bytes"] == (folder / "b.png").read_bytes()
        assert found.row(1)["boxes"] == [[10, 20, 30, 41]]
        assert len(hub.open_hub(folder / "local", "test", "", Quiet())) == 1

    def test_ids(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        assert all(map(hub.is_id, ["org/name", "Org-1/na.me_2"]))
        (folder / "here").mkdir()
        for other in ("name", "here/name", "org/rows.jsonl", "a/b/c", "./b", "org/rows.csv.gz"):
            assert not hub.is_id(other)

    def test_what_is_not_there(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        said = refused(Path("org/name"))
        assert said.startswith("org/name: neither a file, nor a Hugging Face data set that can be")
        assert not (folder / "org").exists()
        monkeypatch.setitem(sys.modules, "datasets", None)
        assert refused(Path("org/name")) == (
            "org/name: a data set of Hugging Face is read with datasets: pip install"
            " 'vision-opd[data]'"
        )
