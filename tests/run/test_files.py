"""Files and folders are written whole or not at all."""

from __future__ import annotations

import json

import pytest

from opd.errors import RunError
from opd.run.files import read_json, replace_folder, write_json, write_text
from tests.support.disk import no_file_above


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_or_stays(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"step": 1, "loss": float("nan")})
    assert read_json(path) == {"step": 1, "loss": None}

    with no_file_above(4), pytest.raises(OSError, match="File too large"):
        write_text(path, "half of it")
    assert json.loads(path.read_text())["step"] == 1
    (tmp_path / "other/file").mkdir(parents=True)  # no file can take its place
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "other", "text")
    assert names(tmp_path) == ["other", "state.json"]


def test_a_folder_is_replaced_or_stays(tmp_path):
    path = tmp_path / "run" / "model"
    replace_folder(path, lambda target: (target / "first").write_text("1"))
    (path.parent / "model.partial").mkdir()  # of a process that was killed
    (path.parent / "model.partial" / "half").write_text("x")
    replace_folder(path, lambda target: (target / "second").write_text("2"))
    assert (names(path.parent), names(path)) == (["model"], ["second"])

    def fail(target):
        (target / "third").write_text("3")
        raise OSError(28, "No space left on device")

    line = "model' cannot be written: No space left on device; what was saved before stays"
    with pytest.raises(RunError, match=line):
        replace_folder(path, fail)
    assert (names(path.parent), names(path)) == (["model"], ["second"])


def test_of_two_processes_that_write_one_folder_the_first_stays(tmp_path):
    """Both measure the same checkpoint, whose model is written once."""

    def second(target):
        (target / "file").write_text("second")
        # the first process ends while this one writes
        other = target.with_name("model.1.partial")
        other.mkdir()
        (other / "file").write_text("first")
        other.rename(tmp_path / "model")

    replace_folder(tmp_path / "model", second, shared=True)
    assert (tmp_path / "model" / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
