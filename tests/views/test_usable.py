"""Training, `opd gap` and `opd sample` skip the same rows, count them, name them and go on."""

from __future__ import annotations

import json
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from opd import registry
from opd.measure.gap import greedy_answers
from opd.progress import Quiet
from opd.prompts.families.qwen_vl import QwenVL
from opd.run.folder import RunFolder
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.types import Box
from opd.views import usable
from opd.views.usable import Skipped, Unusable
from opd.views.view import ViewOptions
from opd_cli import main
from tests.conftest import coloured
from tests.run.test_loop import trainer

GOOD = {
    "image": "tiles.png",
    "question": "What colour is it?",
    "boxes": [[0, 0, 60, 80]],
    "answer": "green",
}
RIBBON = {
    "image": "ribbon.png",
    "question": "Which colour?",
    "boxes": [[0, 900, 5, 1000]],
    "answer": "red",
}
RESERVED = {**GOOD, "question": "What does <|image_pad|> mean?"}
LONG = {**GOOD, "question": "word " * 150}
TEACHER = {**GOOD, "teacher_question": "word " * 150}
VANISHED = {**GOOD, "image": "vanished.png"}
FAULTS = {
    "ribbon": RIBBON,
    "reserved": RESERVED,
    "long": LONG,
    "teacher": TEACHER,
    "vanished": VANISHED,
}


def vanishing(options):
    """A backend with which an image goes away once the rows are read."""
    Path("vanished.png").unlink(missing_ok=True)
    return registry.load("cpu", options)


@pytest.fixture
def here(tmp_path, monkeypatch, installed):
    """A folder of three good rows and a faulty one of each kind; the last one's image goes away
    once the rows are read."""
    monkeypatch.chdir(tmp_path)
    tiles = Image.new("RGB", (240, 160), "white")
    tiles.paste("green", (0, 0, 60, 80))
    tiles.save("tiles.png")
    Image.new("RGB", (5, 2000), "red").save("ribbon.png")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (*[GOOD] * 3, *FAULTS.values()))
    )
    installed(vanishing=vanishing)

    def opd(*arguments):
        tiles.save("vanished.png")
        given = "--model tiny --backend vanishing --data rows.jsonl".split()
        arguments = [*arguments, *given]
        return CliRunner().invoke(
            main,
            [*arguments, "--set", "measure.max_tokens=2", "--set", "data.max_prompt_tokens=600"],
        )

    return opd


def test_rows_that_cannot_be_encoded_are_skipped_wherever_rows_are_encoded(here, tmp_path):
    pytest.importorskip("torch")
    rows = [f"rows.jsonl:{number}" for number in range(4, 9)]
    said = here("gap", "--json")
    found = json.loads(said.stdout)
    assert (found["rows"], found["rows_skipped"], [one["row"] for one in found["skipped"]]) == (
        3,
        5,
        rows,
    )
    for row in found["skipped"]:
        assert said.stderr.count(f"skipped {row['row']}: {row['reason']}\n") == 1
    assert (
        "5 of 8 rows (62.5%) cannot be used: 2 rows: above data.max_prompt_tokens = 600, 1 row: "
        in said.stderr
    )
    said = here("sample", "--json")
    assert [one["row"] for one in json.loads(said.stdout)["answers"]] == [0, 1, 2]
    assert json.loads(said.stdout)["skipped"] == found["skipped"]
    options = (
        "--set rollout.prompts=8 --set rollout.completions=2 --set measure.count=8 "
        "--steps 1 --out run"
    ).split()
    said = here("train", *options)
    assert "3 examples, 5 skipped, 1 step" in said.stdout
    trained = json.loads((tmp_path / "run/summary.json").read_text())
    assert (
        trained["examples"],
        trained["rows_not_measured"],
        trained["rows_unusable"],
        trained["prompts_skipped"],
    ) == (3, 5, 5, 5)
    assert [said.stderr.count(f"skipped {row}: ") for row in rows] == [1] * 5
    assert RunFolder(tmp_path / "run").rows("skipped.jsonl") == found["skipped"]


@pytest.mark.parametrize("question", ["What \ud83d is it?", "\udc00", "half \udfff"])
@pytest.mark.parametrize("field", ["question", "teacher_question"])
def test_half_of_a_surrogate_pair_is_a_fault_of_the_row(question, field):
    (example,) = coloured(1)
    with pytest.raises(Unusable, match="half of a surrogate pair"):
        usable.encode(ToyEncoder(), replace(example, **{field: question}), ViewOptions())


@pytest.mark.parametrize(
    "failure", [OSError("disk"), TypeError("TextEncodeInput must be Union\nand more")]
)
def test_whatever_a_library_raises_for_one_row_is_a_fault_of_the_row(failure):
    class Failing(ToyEncoder):
        def encode(self, images, question, policy="student"):
            raise failure

    with pytest.raises(Unusable, match=r"^the row cannot be encoded: [^\n]*$") as error:
        usable.encode(Failing(), coloured(1)[0], ViewOptions())
    assert error.value.kind == "the row cannot be encoded"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("image not found: /data/a.png", "image not found: /data/sub folder/b.png"),
        (
            "images of 5 x 2000 pixels cannot be encoded: ratio 400.0",
            "images of 7 x 9000 pixels cannot be encoded: ratio 1285.7",
        ),
        ("the question 'a' contains a reserved token such as '<x>'; remove it",) * 2,
    ],
)
def test_like_reasons_are_counted_together(one, other):
    assert Unusable(one).kind == Unusable(other).kind
    assert Unusable(one).kind != Unusable("another reason").kind


def test_rows_are_told_once_and_only_the_first_few():
    notes, progress = [], Quiet()
    progress.note = notes.append
    skipped = Skipped(progress)
    for _ in range(3):
        for example in coloured(9):
            skipped.add(example, Unusable(f"image not found: {example.id}.png"))
    assert len(notes) == 6
    assert notes[0] == "skipped toy:0 (toy-0): image not found: toy-0.png"
    assert notes[-1] == "more rows are skipped; they are counted, and no longer told one by one"
    assert skipped.why() == "9 rows: image not found"
    assert len(skipped.new()) == 9
    assert skipped.new() == []
    assert Skipped(progress, skipped.records()).new() == []


def test_nothing_is_measured_where_no_row_can_be(here, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "rows.jsonl").write_text((json.dumps(LONG) + "\n") * 3)
    for command in ("gap", "sample"):
        result = here(command)
        assert (result.exit_code, result.stdout) == (2, "")
        assert (
            result.stderr.splitlines()[-1]
            == "opd: none of 3 rows can be measured (3 rows: above data.max_prompt_tokens = 600)"
        )


class Large(ToyEncoder):
    """Prompts whose images hold a megabyte each; counts those that are alive at once."""

    def encode(self, images, question, policy="student"):
        prompt = super().encode(images, question, policy)
        return replace(prompt, images={**prompt.images, "ballast": np.zeros(2**17)})


@pytest.mark.parametrize(
    ("room", "together"), [(1, 2), (2**22 + 2**12, 4), (2**23 + 2**20, 8), (2**30, 24)]
)
def test_prompts_that_are_encoded_together_are_bounded_by_their_bytes(room, together):
    asked = []

    class Counting(ToyBackend):
        def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
            asked.append(len(prompts))
            return super().sample(prompts, uniforms, sampling, policy, prefill)

    heard = []
    found = greedy_answers(
        Counting(),
        Large(),
        coloured(12),
        ViewOptions(),
        2,
        10**6,
        heard.append,
        slice_bytes=room,
    )
    assert found == greedy_answers(
        ToyBackend(), ToyEncoder(), coloured(12), ViewOptions(), 2, 10**6
    )
    assert max(asked) == together
    assert sum(asked) == sum(heard) == 24


class Fading(ToyEncoder):
    """Refuses some questions from some call on."""

    def __init__(self, *questions, after=0):
        self.questions, self.after, self.calls = questions, after, 0

    def encode(self, images, question, policy="student"):
        self.calls += 1
        if question in self.questions and self.calls > self.after:
            raise usable.DataError("image not found: /share/x.png")
        return super().encode(images, question, policy)


def test_before_and_after_are_of_the_same_rows(tmp_path):
    """A row that cannot be read before is measured neither before nor after, and one that vanishes
    later leaves both."""
    examples = [replace(one, question=f"q{index}") for index, one in enumerate(coloured(6))]
    one = trainer(
        tmp_path / "run", "measure.count=6", "measure.every=2", "run.steps=4", examples=examples
    )
    notes = []
    one.progress.note = notes.append

    class Changing(Fading):
        """The second row cannot be read at all; the third vanishes in training; the first can be
        read only after it."""

        def encode(self, images, question, policy="student"):
            self.questions = ("q0", "q1") if not one.state.taken else ("q1", "q2")
            return super().encode(images, question, policy)

    one.encoder = Changing()
    summary = one.train()
    assert summary["examples"] == summary["before"]["rows"] == summary["after"]["rows"] == 3
    assert summary["rows_not_measured"] == 3
    folder = RunFolder(tmp_path / "run")
    assert [row["row"] for row in folder.rows("answers.jsonl")] == [2, 3, 4, 5, 3, 4, 5]
    assert [row["rows"] for row in folder.rows("accuracy.jsonl")] == [4, 3, 3]
    assert (
        "2 of 6 rows to be measured cannot be used; they are left out of every comparison" in notes
    )
    assert (
        "1 of 4 rows measured before cannot be used; they are left out of every comparison" in notes
    )


def test_a_run_goes_on_where_no_row_can_be_measured(tmp_path):
    examples = [replace(one, question=f"q{index}") for index, one in enumerate(coloured(8))]
    one = trainer(tmp_path / "run", "measure.count=2", examples=examples)
    one.encoder = Fading("q0", "q1")
    notes = []
    one.progress.note = notes.append
    summary = one.train()
    assert "2 of 2 rows to be measured cannot be used; nothing is measured" in notes
    assert (summary["examples"], summary["rows_not_measured"], summary["verdict"]) == (0, 2, None)
    assert "before" not in summary


def test_the_limit_holds_for_what_is_measured():
    skipped = Skipped(Quiet())
    found = greedy_answers(
        ToyBackend(), ToyEncoder(), coloured(12), ViewOptions(), 2, 10**6, limit=7, skipped=skipped
    )
    assert [one.row for one in found] == [
        row for row, one in enumerate(coloured(12)) if len(one.question) + 1 <= 7
    ]
    assert skipped.why() == f"{12 - len(found)} rows: above data.max_prompt_tokens = 7"
    assert 0 < len(found) < 12


def test_a_row_of_more_views_than_a_prompt_has_tokens_is_not_cut():
    """Nor is its image opened."""
    boxes = tuple(Box(8, 4, 40, 28) for _ in range(9))
    many = replace(coloured(1)[0], images=(Path("nowhere.png"),), boxes=boxes)
    with pytest.raises(Unusable) as said:
        usable.encode(ToyEncoder(), many, ViewOptions(boxes="each"), limit=8)
    assert str(said.value) == "9 views, above data.max_prompt_tokens = 8"
    assert said.value.kind == "above data.max_prompt_tokens = 8"


def test_rows_fall_out_on_another_thread(monkeypatch):
    """Training asks for new rows while the next step's are encoded: none is lost, told twice, or in
    the way."""
    rows = 20_000
    skipped = Skipped(Quiet())
    example = coloured(1)[0]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(
            target=lambda: [
                skipped.add(replace(example, id=str(row), source=""), Unusable("no"))
                for row in range(rows)
            ]
        )
        thread.start()
        found = []
        while thread.is_alive():
            found += skipped.new()
    finally:
        sys.setswitchinterval(interval)
    assert [row["row"] for row in [*found, *skipped.new()]] == [str(row) for row in range(rows)]


def test_rows_that_cannot_be_read_are_counted_where_rows_are_measured(here, tmp_path):
    """A half of a character in a file is told like a row that cannot be encoded."""
    pytest.importorskip("torch")
    half = json.dumps(GOOD).replace("colour", "\\ud83d", 1)
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in (GOOD, GOOD)) + half + "\n"
    )
    for command in ("gap", "sample"):
        found = json.loads(here(command, "--json").stdout)
        assert (found["rows_skipped"], [one["row"] for one in found["skipped"]]) == (
            1,
            ["rows.jsonl:3"],
        )
        assert "surrogate" in found["skipped"][0]["reason"]


@pytest.mark.parametrize("limit", [None, 600])
def test_a_machine_without_memory_is_no_fault_of_a_row(limit):
    """Else a run would lose every row, one by one, and end because none can be used."""

    class Full(ToyEncoder):
        def encode(self, images, question, policy="student"):
            raise MemoryError

    with pytest.raises(MemoryError):
        usable.encode(Full(), coloured(1)[0], ViewOptions(), limit)
    with pytest.raises(MemoryError):
        usable.lengths(Full(), coloured(1)[0], ViewOptions())


@pytest.mark.parametrize("command", ["gap", "train"])
def test_a_machine_without_memory_ends_the_run_in_one_line(here, tmp_path, monkeypatch, command):
    pytest.importorskip("torch")

    lay_out = QwenVL.lay_out

    def full(self, processor, images, *rest):
        if images[0].size == (240, 160):  # a row's; an encoder is opened with other ones
            raise MemoryError
        return lay_out(self, processor, images, *rest)

    (tmp_path / "rows.jsonl").write_text(json.dumps(GOOD) + "\n")
    monkeypatch.setattr(QwenVL, "lay_out", full)
    result = here(command, *(["--out", "run", "--steps", "1"] if command == "train" else []))
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert (
        result.stderr.splitlines()[-1]
        == "opd: not enough memory on this machine; opd plan says what a run takes"
    )
