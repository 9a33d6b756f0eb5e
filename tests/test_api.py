"""A program's view: `opd`'s own names train, measure and read back, as docs/python.md shows."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

import opd
from opd import api
from opd.errors import BackendError, DataError, FolderError, ModelError, RecipeError

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/python.md").read_text()
FUNCTIONS = ("measure_gap", "open_model", "open_run", "read_data", "recipe", "resume", "train")
SMALL = {"prompts": 2, "completions": 2, "max_tokens": 4}
MEASURED = {"count": 2, "max_tokens": 4}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a data file of two rows, one of which cannot be used."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((200, 150)).convert("RGB").save("a.png")
    row = '{"image": "%s", "question": "Which?", "boxes": [[20, 30, 90, 110]]}\n'
    Path("pairs.jsonl").write_text(row % "a.png" + row % "gone.png")
    return tmp_path


def train(**options):
    sections = {"rollout": SMALL, "measure": MEASURED, "run": {"steps": 1, "rollouts_every": 1}}
    return opd.train("tiny", backend="cpu", **{**sections, **options})


def test_the_page_runs(folder, capsys, registers):
    """As it stands, but with smaller steps."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        small = block.replace('run={"steps": 5', f'rollout={SMALL}, run={{"steps": 5')
        exec(compile(small, "docs/python.md", "exec"), names)
    said = capsys.readouterr()
    assert said.err == ""
    assert "recipe 'tiny': unknown key run.stepz; did you mean 'steps'?" in said.out
    assert names["run"].summary["steps"] == 5
    assert len(opd.open_run("runs/seed-1").metrics) == 6


def test_the_page_shows_every_function_and_argument():
    for name in FUNCTIONS:
        (shown,) = re.findall(rf"### `opd\.{name}\((.*)\)`", PAGE)
        given = [part.strip("*, ").partition("=")[0] for part in shown.split(", ")]
        assert [part for part in given if part] == list(
            inspect.signature(getattr(opd, name)).parameters
        )


def test_every_public_name_is_there_and_typed():
    """What type checkers read in `opd/__init__.py` is what is imported when a name is used."""
    tree = ast.parse((ROOT / "opd/__init__.py").read_text())
    (typed,) = (node.body for node in tree.body if isinstance(node, ast.If))
    seen = {node.module: {alias.name for alias in node.names} for node in typed}
    assert seen == {module: set(names.split()) for module, names in opd.MODULES.items()}
    assert set().union(*seen.values()) == set(opd.__all__)
    assert set(opd.__all__) <= set(dir(opd))
    for name in opd.__all__:
        assert getattr(opd, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        opd.trian  # noqa: B018


def test_sections_are_those_of_a_recipe():
    assert list(api.Sections.__annotations__) == list(opd.Recipe.model_fields)


def test_a_recipe_sets_keys_over_its_source(tmp_path):
    (tmp_path / "my.toml").write_text("[run]\nsteps = 7\nseed = 3\n")
    from_file = opd.recipe(tmp_path / "my.toml", run={"steps": 8}, data={"path": tmp_path / "a"})
    assert (from_file.run.steps, from_file.run.seed) == (8, 3)
    assert from_file.data.path == str(tmp_path / "a")
    assert from_file.optimizer == opd.recipe("tiny").optimizer
    assert opd.recipe(model={"path": "some/model"}).model.tune == "lora"


def test_a_run_reads_back_and_its_model_opens_as_it_was_measured(tmp_path):
    run = train(out=tmp_path / "run")
    assert run == opd.open_run(str(tmp_path / "run"))
    assert run.recipe.rollout.prompts == 2
    assert [row["step"] for row in run.metrics] == [1]
    assert [row["when"] for row in run.answers] == ["before"] * 2 + ["after"] * 2
    assert [row["step"] for row in run.accuracy] == [0, 1]
    assert len(run.rollouts) == 2
    assert run.skipped == []
    assert run.result == tmp_path / "run" / "model"
    gap = opd.measure_gap(opd.open_model(run.path))
    after = run.summary["after"]
    assert {name: getattr(gap, name) for name in ("rows", "full_accuracy", "gap")} == {
        name: after[name] for name in ("rows", "full_accuracy", "gap")
    }
    assert [one.full for one in gap.answers] == [row["full"] for row in run.answers[2:]]
    assert opd.resume(run.path, steps=2).summary["steps"] == 2


def test_keys_are_set_over_a_recipe_too(tmp_path):
    small = opd.recipe("tiny", rollout=SMALL, measure={"count": 0}, run={"steps": 9})
    run = opd.train(small, run={"steps": 1}, out=tmp_path / "run", backend="cpu")
    assert run.recipe.run.steps == 1
    assert run.recipe.rollout == small.rollout


def test_the_default_folder_is_a_new_one(folder):
    runs = [train(measure={"count": 0}).path for _ in range(2)]
    assert [str(path) for path in runs] == ["runs/tiny", "runs/tiny-2"]


def test_rows_that_cannot_be_used_are_told(folder):
    heard = []

    class Heard(opd.Quiet):
        def note(self, message):
            heard.append(message)

    pairs = opd.read_data("pairs.jsonl", progress=Heard())
    assert len(pairs) == 1
    assert "pairs.jsonl:2" in heard[-1]
    gap = opd.measure_gap(opd.open_model(backend="cpu", measure=MEASURED), pairs)
    assert (gap.rows, gap.rows_with_answer, gap.gap) == (1, 0, None)
    assert [row["row"] for row in gap.skipped] == ["pairs.jsonl:2"]
    with pytest.raises(DataError, match=r"gone\.png"):
        opd.read_data("pairs.jsonl", strict=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: opd.recipe("tinny"), RecipeError, "did you mean 'tiny'"),
        (lambda: opd.recipe("tiny", runs={"steps": 1}), RecipeError, "did you mean 'run'"),
        (lambda: opd.recipe("tiny", run={"stepz": 1}), RecipeError, "did you mean 'steps'"),
        (lambda: opd.recipe("tiny", run={"steps": 0}), RecipeError, "run.steps = 0"),
        (lambda: opd.recipe("tiny", run=5), RecipeError, "run = 5 is no section"),
        (lambda: opd.read_data("gone.jsonl"), DataError, "gone.jsonl"),
        (lambda: opd.read_data("a\0b"), DataError, "holds characters"),
        (lambda: opd.open_model("gone"), ModelError, "no such folder"),
        (lambda: opd.open_model("a\0b"), ModelError, "holds characters"),
        (lambda: opd.open_model(backend="tpu"), BackendError, "unknown backend"),
        (lambda: opd.train("tiny", out="a\0b"), FolderError, "holds characters"),
        (lambda: opd.train(model={"path": "gone"}), ModelError, "no such folder"),
        (lambda: opd.resume("gone"), FolderError, "not found"),
        (lambda: opd.open_run("."), FolderError, "no run folder"),
    ],
)
def test_mistakes_are_one_line(call, error, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_run_has_no_summary(tmp_path):
    (tmp_path / "config.toml").write_text("[run]\nsteps = 3\n")
    run = opd.open_run(tmp_path)
    assert (run.recipe.run.steps, run.metrics, run.answers) == (3, [], [])
    with pytest.raises(FolderError, match=r"not done.*opd\.resume"):
        _ = run.summary
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(FolderError, match="cannot be read"):
        _ = run.summary


def test_nothing_to_measure_is_told():
    model = api.Model(opd.recipe("tiny", measure={"count": 0}), "toy", None, None)
    with pytest.raises(DataError, match="nothing to measure"):
        opd.measure_gap(model)
    unknown = api.Model(opd.recipe("lora", model={"path": "some/model"}), "toy", None, None)
    with pytest.raises(RecipeError, match="has no data yet"):
        opd.measure_gap(unknown)
