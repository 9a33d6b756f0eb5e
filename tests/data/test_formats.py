"""The table of formats: which reader reads a file, and a reader that a program registers."""

from __future__ import annotations

import csv
import json
from functools import partial

import pytest
from PIL import Image

from opd.data import open_data
from opd.data.formats import REGISTERED, Rows, choice, register
from opd.data.formats.choice import rows_of
from opd.data.reading import AS_IT_IS
from opd.errors import DataError
from opd.progress import Quiet
from opd.types import Box

ROW = {"image": "a.png", "question": "Which?", "boxes": [[10, 20, 30, 40]]}


class Csv:
    """Columns path, question, left, top, right, bottom in thousandths."""

    name = "a table of boxes"

    def recognise(self, path, start):
        return start.startswith(b"path,question,left")

    def read(self, path):
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        rows = [(number, partial(self.row, line)) for number, line in enumerate(lines, start=2)]
        return Rows(path, path.read_bytes(), rows, "per-mille", ["a note"])

    def row(self, line):
        try:
            box = [float(line[side]) for side in ("left", "top", "right", "bottom")]
        except ValueError as error:
            raise DataError(f"column of a box: {error}") from error
        return {"image": line["path"], "question": line["question"], "boxes": [box]}


@pytest.fixture
def folder(tmp_path, registers):
    """Two pictures and a table of four rows, two of which are faulty."""
    for name in "ab":
        Image.linear_gradient("L").resize((200, 100)).convert("RGB").save(tmp_path / f"{name}.png")
    table = "path,question,left,top,right,bottom\n"
    table += "a.png,One?,100,200,300,400\nb.png,Two?,x,0,1,1\ngone.png,Three?,0,0,9,9\n"
    (tmp_path / "table.csv").write_text(table + "b.png,Four?,0,0,500,1000\n")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW))
    return tmp_path


def test_a_registered_reader_reads_what_it_recognises(folder):
    with pytest.raises(DataError, match="no column is known to hold the image; say"):
        open_data(str(folder / "table.csv"))
    register(Csv())
    found = open_data(str(folder / "table.csv"))
    assert [(one.source, one.question) for one in found] == [
        ("table.csv:2", "One?"),
        ("table.csv:5", "Four?"),
    ]
    assert [one.boxes for one in found] == [(Box(20, 20, 60, 40),), (Box(0, 0, 100, 100),)]
    assert found.skipped[0] == (
        "table.csv:3",
        "column of a box: could not convert string to float: 'x'",
    )
    assert found.skipped[1][0] == "table.csv:4"
    assert found.notes == [f"{folder / 'table.csv'}: read as a table of boxes: 4 rows", "a note"]
    few = open_data(str(folder / "table.csv"), count=1)
    assert [one.question for one in few] == ["One?"]
    assert few.fingerprint != found.fingerprint
    with pytest.raises(DataError, match=r"table\.csv:3: column of a box"):
        open_data(str(folder / "table.csv"), strict=True)


def test_our_own_rows_are_read_as_before(folder):
    before = open_data(str(folder / "rows.jsonl"))
    register(Csv())
    after = open_data(str(folder / "rows.jsonl"))
    assert (list(after), after.fingerprint, after.notes) == (list(before), before.fingerprint, [])


def test_readers_are_asked_in_order_with_the_beginning_of_a_file(folder):
    asked = []

    class Asks(Csv):
        def __init__(self, name, answer):
            self.name, self.answer = name, answer

        def recognise(self, path, start):
            asked.append((self.name, path.name, start))
            return self.answer

    for reader in (Asks("first", False), Asks("second", False), Asks("second", True)):
        register(reader)
    table = (folder / "table.csv").read_bytes()
    (folder / "long").write_bytes(table + b" " * 100_000)
    assert "second" in rows_of(folder / "long", AS_IT_IS, Quiet()).notes[0]
    start = table + b" " * (choice.START - len(table))
    assert asked == [(name, "long", start) for name in ("first", "second")]
    asked.clear()
    for path in (folder, folder / "missing"):
        REGISTERED["second"].answer = False
        with pytest.raises(DataError):
            rows_of(path, AS_IT_IS, Quiet())
    assert [start for *_, start in asked] == [b""] * 4
