"""Paths on the command line and in recipes: the home folder, and names that no file system
holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from opd.errors import FolderError, RecipeError
from opd.paths import expanded, stem
from opd.run import recipe as recipes
from opd.run.folder import RunFolder, check_empty
from opd.tiny import MODEL
from tests.cli.test_mistakes import GOOD, refused
from tests.cli.test_train import opd
from tests.support import recorder

LONG = "n" * 300
FEW = ["--set", "measure.count=2", "--set", "rollout.prompts=2", "--set", "rollout.completions=2"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with data, and another folder to work in."""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save(home / "street.png")
    (home / "pairs.jsonl").write_text(json.dumps(GOOD))
    return home


def test_the_home_folder_in_every_option_and_key(home):
    (home / "model").symlink_to(MODEL)
    recipe = (
        'preset = "tiny"\n[data]\npath = "~/pairs.jsonl"\n[model]\npath ='
        ' "~/model"\n[measure]\npath = "~/pairs.jsonl"\n'
    )
    (home / "my.toml").write_text(recipe)
    read = recipes.load("~/my.toml", ['model.path="~/model"'])
    assert (read.data.path, read.model.path, read.measure.path) == (
        str(home / "pairs.jsonl"), str(home / "model"), str(home / "pairs.jsonl"),
    )  # fmt: skip
    (home / "model").unlink()
    opd(
        *"train ~/my.toml --model tiny --backend cpu --steps 1 --out ~/run".split(),
        *FEW,
    )
    assert (home / "run/summary.json").is_file()
    assert "the one step" in opd("train", "--resume", "~/run").stderr
    opd("export", "~/run", "--out", "~/out")
    assert (home / "out/config.json").is_file()
    measured = "--model ~/out --data ~/pairs.jsonl --backend cpu --count 1 --json".split()
    assert json.loads(opd("gap", *measured).stdout)["rows"] == 1
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--out", LONG],
        ["train", "--out", f"runs/{LONG}/run"],
        ["train", "--out", "runs/" + "n" * 254, "--force"],
        ["train", "--out", "/".join(["n" * 200] * 21)],
        ["train", "--resume", LONG],
        ["train", "--data", LONG],
        ["train", "--data", f"{LONG}/pairs.jsonl"],
        ["train", "--model", LONG],
        ["gap", "--model", f"org/{LONG}"],
        ["sample", "--set", f"measure.path={LONG}"],
        ["train", f"{LONG}.toml"],
        ["plan", "--model", f"~/{LONG}"],
        ["export", LONG, "--out", "out"],
        ["export", "old", "--out", LONG],
        ["export", "old", "--out", "n" * 250],
    ],
)
def test_an_over_long_name_is_one_line(home, arguments):
    Path("old").mkdir()
    Path("old/config.toml").write_text("")
    said = refused(Path(), *arguments)
    assert "is too long, with" in said
    assert len(said) < 300


def test_what_no_file_is_called(home):
    for text, fault in {
        "a\0b": "holds characters that no file name holds",
        "a\ud800b": "unable to parse",
    }.items():
        with pytest.raises(RecipeError, match=fault):
            recipes.validate({"data": {"path": text}}, "my.toml")
    with pytest.raises(RecipeError, match=r"model\.path"):
        recipes.validate({"model": {"path": ""}}, "my.toml")
    for check in (RunFolder.check, RunFolder.open, check_empty):
        with pytest.raises(FolderError, match="is too long"):
            check(Path(LONG))
    assert expanded("~nobody-of-this-name/x") == "~nobody-of-this-name/x"
    assert expanded("runs/a~b") == "runs/a~b"


@pytest.mark.parametrize("name", ["d" * 249 + ".jsonl", "数" * 80 + ".jsonl", "d" * 255])
def test_a_default_run_folder_fits_under_any_data(home, installed, name):
    """Named after the data, and short enough for -2 and ~1."""
    installed(recorder=recorder.load)
    (home / name).write_bytes((home / "pairs.jsonl").read_bytes())
    opd("train", "--data", home / name, "--backend", "recorder", "--steps", 1, *FEW)
    (run,) = Path("runs").iterdir()
    RunFolder.check(run, force=True)
    assert 100 <= len(run.name.encode()) <= 120


def test_the_name_of_data():
    assert stem("a.b.jsonl") == "a.b"
    assert stem("/") == "run"
