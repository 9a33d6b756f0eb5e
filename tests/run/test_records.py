"""Records of a run that were cut or edited by hand: one line that names file and line, and nothing
measured again without a word."""

from __future__ import annotations

import json
import shutil

import pytest

from opd.errors import FolderError
from opd.run import records
from opd.run.folder import RunFolder
from tests.run.test_loop import trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of the toy backend that is done, two of whose rows could not be used."""
    run = tmp_path_factory.mktemp("made") / "run"
    trainer(run).train()
    for row in ("a", "b"):
        RunFolder(run).append(
            records.SKIPPED, {"row": row, "reason": "no image", "kind": "no image"}
        )
    records.check(RunFolder(run))
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def edit(run, name, line, **values):
    """Sets fields of a line, counted from 1; `...` removes one."""
    lines = (run / name).read_text().splitlines()
    row = json.loads(lines[line - 1]) | values
    lines[line - 1] = json.dumps({key: value for key, value in row.items() if value is not ...})
    (run / name).write_text("\n".join(lines) + "\n")


def damaged(run):
    """What is said; the same by the check before a model is opened, and by a trainer that goes
    on."""
    with pytest.raises(FolderError) as checked:
        records.check(RunFolder(run))
    with pytest.raises(FolderError) as caught:
        trainer(run).train()
    assert str(caught.value) == str(checked.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"when": "befor"}, "field 'when' is \"befor\", neither"),
        ({"when": ...}, "field 'when' is missing"),
        ({"when": 1}, "field 'when' is 1, not a text"),
        ({"full": None}, "field 'full' is null, not a text"),
        ({"crop": ["a"]}, "field 'crop' is [\"a\"], not a text"),
        ({"full_right": "yes"}, "field 'full_right' is \"yes\", not true or false or null"),
        ({"crop_right": 1}, "field 'crop_right' is 1, not true or false or null"),
        (
            {"crop_right": None},
            "'full_right' and 'crop_right' are null where 'answer' is, and only there",
        ),
        (
            {"answer": None},
            "'full_right' and 'crop_right' are null where 'answer' is, and only there",
        ),
        ({"crop": None}, "'crop_right' is not null, but 'crop' is"),
        (
            {"crop": None, "crop_right": None, "full_right": None},
            "'full_right' and 'crop_right' are null where 'answer' is, and only there",
        ),
        ({"answer": ["a", 1]}, "field 'answer' is [\"a\", 1], not a list of texts"),
        ({"row": True}, "field 'row' is true, not a whole number"),
        ({"row": ...}, "field 'row' is missing"),
        ({"id": ...}, "field 'id' is missing"),
        ({"fulll": "x"}, 'field "fulll" is not known'),
    ],
    ids=str,
)
def test_an_answer_that_nobody_gave_is_named(run, values, said):
    edit(run, "answers.jsonl", 2, **values)
    line = damaged(run)
    assert f"answers.jsonl' is damaged at line 2: {said}" in line
    assert line.endswith(
        "; restore the file, or begin the run anew: what was measured before training cannot be"
        " measured again"
    )


@pytest.mark.parametrize("content", [b"", b"\n", None], ids=["empty", "blank", "gone"])
def test_answers_that_are_gone_are_not_given_again(run, content):
    (run / "answers.jsonl").unlink()
    if content is not None:
        (run / "answers.jsonl").write_bytes(content)
    assert (
        "answers.jsonl' is damaged: it holds 0 answers of before training, and accuracy.jsonl was"
        " made of 4; restore" in damaged(run)
    )


def test_some_answers_that_are_gone_are_missed(run):
    lines = (run / "answers.jsonl").read_text().splitlines()
    (run / "answers.jsonl").write_text("\n".join(lines[1:]) + "\n")
    assert "holds 3 answers of before training" in damaged(run)
    (run / "answers.jsonl").write_text("\n".join(lines[:4]))  # cut within the last answer of before
    assert "holds 3 answers of before training" in damaged(run)


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("skipped.jsonl", {"row": 3}, "field 'row' is 3, not a text; remove that line to go on"),
        ("skipped.jsonl", {"kind": ...}, "field 'kind' is missing; remove that line to go on"),
        (
            "skipped.jsonl",
            {"reason": None},
            "field 'reason' is null, not a text; remove that line to go on",
        ),
        (
            "accuracy.jsonl",
            {"step": "0"},
            "field 'step' is \"0\", not a whole number; restore the file",
        ),
        ("accuracy.jsonl", {"rows": ...}, "field 'rows' is missing; restore the file"),
        (
            "metrics.jsonl",
            {"step": None},
            "field 'step' is null, not a whole number; remove that line to go on",
        ),
        (
            "metrics.jsonl",
            {"taken": 1},
            "field 'taken' is 1, not true or false; remove that line to go on",
        ),
        (
            "metrics.jsonl",
            {"completions": 1.5},
            "field 'completions' is 1.5, not a whole number; remove that line to go on",
        ),
        ("rollouts.jsonl", {"step": ...}, "field 'step' is missing; remove that line to go on"),
    ],
    ids=str,
)
def test_other_records_are_held_to_their_fields(run, name, values, said):
    edit(run, name, 1, **values)
    assert f"{name}' is damaged at line 1: {said}" in damaged(run)


@pytest.mark.parametrize("name", records.FIELDS)
@pytest.mark.parametrize(
    "line",
    [b"{", b"[]", b"3", b'"a"', b"null", b"\xff\xfe", b"[" * 100_000],
    ids=lambda line: repr(line[:8]),
)
def test_what_is_no_row_is_one_line(run, name, line):
    (run / name).write_bytes(line + b"\n" + (run / name).read_bytes())
    assert f"{name}' is damaged at line 1: " in damaged(run)


def test_a_record_that_is_no_file_is_one_line(run):
    (run / "skipped.jsonl").unlink()
    (run / "skipped.jsonl").mkdir()
    assert "skipped.jsonl' cannot be read: Is a directory" in damaged(run)


def test_a_row_behind_a_half_written_one_has_a_line_of_its_own(run):
    with (run / "skipped.jsonl").open("a") as file:
        file.write('{"row": "c", "rea')
    trainer(run).train()
    RunFolder(run).append("skipped.jsonl", {"row": "d", "reason": "no image", "kind": "no image"})
    assert [row["row"] for row in records.read(RunFolder(run), "skipped.jsonl")] == ["a", "b", "d"]


def test_where_nothing_was_measured_before_training_it_is_said(run):
    for name in ("answers.jsonl", "accuracy.jsonl"):
        (run / name).unlink()
    one, notes = trainer(run), []
    one.progress.note = notes.append
    one.train()
    assert (
        "no answers of before training are kept: what is called before is measured after step"
        f" {one.recipe.run.steps}" in notes
    )
