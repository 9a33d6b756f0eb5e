"""`opd data locate`: rows with boxes from a planted model, and calls that go on with a file."""

from __future__ import annotations

import fcntl
import json
import shutil
from typing import ClassVar

import pytest
from click.testing import CliRunner
from PIL import Image

from opd.data import open_data
from opd.types import Box
from opd_cli import main
from tests.locate.looking import SeesRed

ROWS = 20
"""More than a locator takes at a time."""


class Seeing(SeesRed):
    """Looks at a place of the picture under the rows' question; stops after `stop` calls."""

    calls: ClassVar[list] = []
    stop: ClassVar = None
    faults: ClassVar = {}

    def __init__(self, options=None):
        super().__init__()

    @property
    def look(self):
        return self.faults

    def attend(self, prompts, completions, policy="student"):
        self.calls.append(len(prompts))
        if self.stop is not None and len(self.calls) > self.stop:
            raise KeyboardInterrupt
        return super().attend(prompts, completions, policy)


def seeing(options):
    return Seeing()


@pytest.fixture
def folder(tmp_path, installed, monkeypatch):
    """Rows of two pictures of the tiny model's size, without boxes, and a backend that sees."""
    installed(seeing=seeing)
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        Image.new("RGB", (128, 128), "red").save(f"{name}.png")
    rows = [
        {"image": f"{'ab'[number % 2]}.png", "question": "What digit?", "answer": "7"}
        for number in range(ROWS)
    ]
    write(tmp_path / "data.jsonl", rows)
    monkeypatch.setattr(Seeing, "calls", [])
    monkeypatch.setattr(Seeing, "stop", None)
    # The neutral question has other tokens than the rows'.
    monkeypatch.setattr(
        Seeing, "faults", {text_tokens("What digit?"): [(0, (32, 48, 64, 80), 0.1)]}
    )
    return tmp_path


def text_tokens(question):
    from opd.prompts.processor import open_encoder
    from opd.tiny import MODEL

    prompt = open_encoder(MODEL).encode([Image.new("RGB", (128, 128))], question)
    return len(prompt) - len(prompt.visual.index)


def write(path, rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def locate(data="data.jsonl", *more, by="attention", out="out.jsonl"):
    command = ["data", "locate", data, "--by", by, "--model", "tiny", "--backend", "seeing"]
    return CliRunner().invoke(main, [*command, "--out", str(out), *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_get_boxes_that_are_read_back(folder):
    done = locate()
    assert done.exit_code == 0, done.output
    assert done.stdout == (
        "out.jsonl: 20 rows, 20 located by attention, median confidence 0.94, median box"
        " 6.2 % of the picture\n"
    )
    first = lines(folder / "out.jsonl")[0]
    assert first == {
        "id": "data.jsonl:1",
        "image": "a.png",
        "question": "What digit?",
        "boxes": [[32, 48, 64, 80]],
        "answer": "7",
        "located": {
            "by": "attention",
            "confidence": 0.9375,
            "area": 0.0625,
            "model": "tiny",
            "row": "data.jsonl:1",
        },
    }
    read = open_data("out.jsonl")
    assert len(read) == ROWS
    assert read[0].boxes == (Box(32, 48, 64, 80),)
    assert read.notes == []


def test_the_result_as_json(folder):
    said = json.loads(locate("data.jsonl", "--json", "--count", "4").stdout)
    assert said == {
        "out": "out.jsonl",
        "by": "attention",
        "model": "tiny",
        "rows": 4,
        "located": 4,
        "median_confidence": 0.9375,
        "median_box_area": 0.0625,
        "skipped": [],
    }


def test_a_stopped_call_is_gone_on_with(folder, monkeypatch):
    """What was located is on the disk, also where the last line is torn; nothing is done twice."""
    assert locate(out="whole.jsonl").exit_code == 0
    whole = (folder / "whole.jsonl").read_bytes()
    assert len(Seeing.calls) == 2
    Seeing.calls.clear()
    monkeypatch.setattr(Seeing, "stop", 1)
    assert locate().exit_code == 130
    out = folder / "out.jsonl"
    kept = out.read_bytes()
    assert 0 < len(kept) < len(whole)
    assert whole.startswith(kept)
    out.write_bytes(kept[:-9])
    monkeypatch.setattr(Seeing, "stop", None)
    Seeing.calls.clear()
    done = locate()
    assert done.exit_code == 0
    number = kept.count(b"\n")
    assert f"out.jsonl:{number}: this line was not finished" in done.stderr
    assert out.read_bytes() == whole
    assert sum(Seeing.calls) == 2 * (ROWS - number + 1)  # each with its question and the neutral
    Seeing.calls.clear()
    assert locate().stdout.startswith("out.jsonl: 20 rows, 20 located")
    assert Seeing.calls == []


def test_more_rows_are_added_to_few(folder):
    assert locate("data.jsonl", "--count", "3").exit_code == 0
    assert locate().exit_code == 0
    assert len({row["id"] for row in lines(folder / "out.jsonl")}) == ROWS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"by": "tiles"}, "'out.jsonl' was located by attention with the model tiny, not by tiles"),
        ({"out": "data.jsonl"}, "'data.jsonl' is the data itself"),
        ({"out": "foreign.jsonl"}, "'foreign.jsonl' exists, and its line 1 is no row of opd data"),
        ({"out": "text.jsonl"}, "'text.jsonl' exists, and its line 1 is no row of opd data"),
        ({"out": "out.json"}, "rows are written as JSON lines; name it out.jsonl"),
        ({"out": "folder.jsonl"}, "'folder.jsonl' is not a file"),
        ({"by": "guessing"}, "'guessing' is not one of"),
    ],
)
def test_a_file_of_something_else_stays(folder, change, said):
    assert locate("data.jsonl", "--count", "2").exit_code == 0
    shutil.copy("data.jsonl", "foreign.jsonl")
    (folder / "text.jsonl").write_text("no json")
    (folder / "folder.jsonl").mkdir()
    before = {path: path.read_bytes() for path in folder.glob("*.jsonl") if path.is_file()}
    done = locate(**change)
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1
    for path, content in before.items():
        assert path.read_bytes() == content


def test_another_model_is_refused(folder):
    assert locate("data.jsonl", "--count", "2").exit_code == 0
    rows = lines(folder / "out.jsonl")
    rows[1]["located"]["model"] = "Qwen/Qwen3-VL-4B-Instruct"
    write(folder / "out.jsonl", rows)
    done = locate()
    assert done.exit_code == 2
    assert "with the model Qwen/Qwen3-VL-4B-Instruct, not by attention with tiny" in done.stderr


def test_other_data_of_the_same_name_is_refused(folder):
    assert locate("data.jsonl", "--count", "2").exit_code == 0
    rows = [{**row, "question": "Another?"} for row in lines(folder / "data.jsonl")]
    write(folder / "data.jsonl", rows)
    done = locate()
    assert done.exit_code == 2
    assert "'out.jsonl' holds another row data.jsonl:1" in done.stderr


def test_two_processes_do_not_write_one_file(folder):
    assert locate("data.jsonl", "--count", "2").exit_code == 0
    with (folder / "out.jsonl").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        done = locate()
    assert done.exit_code == 2
    assert "'out.jsonl' is being written by another process" in done.stderr


def test_rows_where_nothing_is_found_have_no_boxes(folder, monkeypatch):
    monkeypatch.setattr(Seeing, "faults", {})
    done = locate()
    assert done.stdout == "out.jsonl: 20 rows, 0 located by attention\n"
    assert "boxes" not in lines(folder / "out.jsonl")[0]
    assert lines(folder / "out.jsonl")[0]["located"]["confidence"] == 0
    assert len(open_data("out.jsonl", evidence=False)) == ROWS


def test_evidence_of_another_origin_is_replaced(folder):
    rows = lines(folder / "data.jsonl")
    write(folder / "data.jsonl", [{**row, "teacher_image": "b.png"} for row in rows])
    assert locate("data.jsonl", "--count", "2").exit_code == 0
    (one, _) = open_data("out.jsonl")
    assert (one.boxes, one.teacher_images) == ((Box(32, 48, 64, 80),), ())


def test_rows_that_cannot_be_used_are_named(folder):
    """One picture is too small for the encoder, or all are."""
    Image.new("RGB", (9000, 2), "red").save(folder / "b.png")
    done = locate("data.jsonl", "--json", "--set", "data.max_prompt_tokens=99")
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["rows"] == 10
    assert len(said["skipped"]) == 10
    assert said["skipped"][0]["row"] == "data.jsonl:2"
    shutil.copy("b.png", "a.png")
    done = locate(out="none.jsonl")
    assert done.exit_code == 2
    assert "no row could be used" in done.stderr
    assert not (folder / "none.jsonl").exists()


def test_missing_data_leave_no_file(folder):
    done = locate("missing.jsonl")
    assert done.exit_code == 2
    assert "data file not found: missing.jsonl" in done.stderr
    assert not (folder / "out.jsonl").exists()


def test_the_methods_are_the_tables():
    from opd.locate import LOCATORS
    from opd_cli.data.locate import METHODS

    assert tuple(LOCATORS) == METHODS


def test_the_scenes_of_the_embedded_task_are_located_too(folder):
    """Their pictures are written beside the rows."""
    done = locate("tiny", "--count", "2")
    assert done.exit_code == 0, done.stderr
    first = lines(folder / "out.jsonl")[0]
    assert first["id"] == "tiny-train-000000"
    assert (folder / first["image"]).is_file()
    assert len(open_data("out.jsonl", evidence=False)) == 2
