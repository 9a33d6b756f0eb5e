"""What is done with a run's model next is done by the run's own recipe."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from opd.errors import DataError, FolderError, RecipeError
from opd.run import inherit
from opd.run.recipe import PRESETS
from tests.cli.test_mistakes import refused
from tests.cli.test_train import FAST, metrics, opd, photos
from tests.support.random_models import qwen3_vl

LORA = [
    "model.tune=lora",
    "model.rank=4",
    "model.vision=true",
    "model.dtype=bfloat16",
    "model.max_pixels=9000",
    "view.enlarge=2.0",
]
SLOW = [
    "optimizer.learning_rate=2e-6",
    "optimizer.schedule=constant",
    "measure.max_tokens=5",
    "rollout.max_tokens=4",
]


def sets(*options):
    return [word for option in options for word in ("--set", option)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """On a model of one's own that is not the embedded one: a full run measured on a file of its
    own, and one of adapters."""
    folder = tmp_path_factory.mktemp("runs")
    qwen3_vl(folder / "base")
    photos.__wrapped__(folder)
    shutil.copy(folder / "pairs.jsonl", folder / "held.jsonl")
    given = [
        "--backend",
        "cpu",
        "--model",
        folder / "base",
        "--data",
        folder / "pairs.jsonl",
        "--steps",
        2,
        *FAST,
    ]
    held = f"measure.path={folder / 'held.jsonl'}"
    full = [
        *given,
        "--set",
        "model.tune=full",
        *sets(*SLOW, held, "view.enlarge=2.0", "model.max_pixels=9000", "measure.count=7"),
    ]
    opd("train", "paper", *full, "--out", folder / "full", "--seed", 5)
    opd("train", *given, *sets(*LORA, *SLOW), "--out", folder / "lora")
    return folder


@pytest.fixture
def here(runs, tmp_path, monkeypatch):
    """A copy of the runs in the current folder; their data stay where they are."""
    for name in ("full", "lora"):
        shutil.copytree(runs / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return runs


def resolved(path, *overrides, source=None, training=False):
    return inherit.resolve(source, [f"model.path={path}", *overrides], training)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_run_is_measured_as_it_measured_itself(here, name):
    after = json.loads(Path(name, "summary.json").read_text())["after"]
    result = opd("gap", "--model", name, "--json")
    measured = json.loads(result.stdout)
    assert {key: measured[key] for key in after} == after
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("the recipe of run")]
    where = here / ("held.jsonl" if name == "full" else "pairs.jsonl")
    dtype = "bfloat16"
    tune = name
    assert line.startswith(
        f"the recipe of run '{name}': tune {tune}, dtype {dtype}, view crop, max_pixels 9000, "
    )
    assert f" rows of {where}, backend cpu" in line
    answers = [json.loads(line) for line in Path(name, "answers.jsonl").read_text().splitlines()]
    said = json.loads(opd("sample", "--model", name, "--json", "--count", 4).stdout)["answers"]
    whole = json.loads(opd("sample", "--model", name, "--json", "--count", after["rows"]).stdout)[
        "answers"
    ]
    kept = [
        {key: value for key, value in row.items() if key != "when"}
        for row in answers
        if row["when"] == "after"
    ]
    assert [
        {key: value for key, value in row.items() if key != "question"} for row in whole
    ] == kept
    assert all(row["question"] for row in whole)
    assert len(said) == 4


def test_a_run_is_trained_on_as_it_was_trained(here):
    """All but data and seed: a full run does not become adapters at 25 times the rate."""
    said = opd(
        *"train --model full --data".split(),
        here / "pairs.jsonl",
        *"--out more --backend cpu --set run.rollouts_every=0".split(),
    ).stderr
    assert (
        "the recipe, but data and seed, of run 'full': tune full, dtype bfloat16, learning rate"
        " 2e-06, 2 steps, view crop, max_pixels 9000" in said
    )
    ours, theirs = (
        json.loads(Path(name, "inputs.json").read_text())["recipe"] for name in ("more", "full")
    )
    assert (ours["run"].pop("seed"), theirs["run"].pop("seed")) == (0, 5)
    assert (ours["run"].pop("rollouts_every"), theirs["run"].pop("rollouts_every")) == (0, 10)
    assert ours == theirs
    assert [row["step"] for row in metrics(Path("more"))] == [1, 2]
    assert "--data FILE" in refused(Path(), "train", "--model", "full", "--out", "other")


@pytest.mark.parametrize(
    "path", ["full", "full/model", "full/checkpoints/step-000002", "full/checkpoints/step-000001"]
)
def test_all_that_a_run_leaves_has_its_recipe(here, path):
    for training in (False, True):
        found = resolved(path, training=training)
        model, optimizer = found.recipe.model, found.recipe.optimizer
        assert (model.path, model.tune, model.max_pixels, model.dtype) == (
            path,
            "full",
            9000,
            "bfloat16",
        )
        assert (
            optimizer.learning_rate,
            found.recipe.view.enlarge,
            found.recipe.measure.max_tokens,
        ) == (2e-6, 2.0, 5)
        assert found.recipe.measure.path == str(here / "held.jsonl")
        assert found.recipe.data.path == ("tiny" if training else str(here / "pairs.jsonl"))
        assert ("step 1 of 2" in found.line) == path.endswith("1")


def test_an_option_and_a_recipe_come_first(here):
    assert resolved("full", "view.kind=full").recipe.view.kind == "full"
    other = str(here / "pairs.jsonl")
    # what is named is measured
    assert resolved("full", f"data.path={other}").recipe.measure.path == ""
    assert resolved("full", f"data.path={other}", training=True).recipe.measure.path == str(
        here / "held.jsonl"
    )
    assert (
        resolved("full", f"data.path={other}", "measure.path=x.jsonl").recipe.measure.path
        == "x.jsonl"
    )
    for preset in PRESETS:
        found = resolved("full", source=preset)
        assert found.line == ""
        assert (
            found.recipe.optimizer.learning_rate
            == {"tiny": 6e-4, "paper": 2e-6, "lora": 5e-5}[preset]
        )
    Path("my.toml").write_text("[optimizer]\nlearning_rate = 1e-7\n")
    found = resolved("full", source="my.toml", training=True)
    assert (found.recipe.optimizer.learning_rate, found.recipe.model.tune) == (1e-7, "full")
    assert "of run 'full': tune full, dtype bfloat16, learning rate 1e-07" in found.line
    Path("my.toml").write_text('preset = "lora"\n[model]\npath = "full"\n')
    assert inherit.resolve("my.toml").recipe.model.tune == "lora"
    Path("my.toml").write_text('[model]\npath = "full"\n')
    assert inherit.resolve("my.toml").recipe.model.tune == "full"
    adapted = resolved("full", "model.tune=lora", training=True)
    assert not adapted.recipe.model.vision  # it follows what is trained


def test_an_export_has_its_recipe_without_paths(here):
    opd("export", "lora", "--out", "merged")
    opd("export", "lora", "--out", "adapter", "--as", "adapter")
    for name in ("merged", "adapter"):
        assert str(here) not in Path(name, "recipe.toml").read_text()
        found = resolved(name)
        assert found.line.startswith(f"the recipe of '{name}': tune lora, dtype bfloat16")
        assert (found.recipe.model.max_pixels, found.recipe.view.enlarge) == (9000, 2.0)
        assert "--data FILE" in refused(Path(), "gap", "--model", name)
    measured = json.loads(
        opd(
            *"gap --model adapter --data".split(),
            here / "pairs.jsonl",
            "--json",
            "--backend",
            "cpu",
        ).stdout
    )
    after = json.loads(Path("lora/summary.json").read_text())["after"]
    assert {key: measured[key] for key in after} == after


def test_other_models_have_no_recipe(here, tmp_path):
    for path in (here / "base", "org/model", "nowhere", "tiny", "n" * 300, "lora/checkpoints"):
        assert inherit.origin(str(path)) is None
    assert resolved(here / "base").line == "preset lora: no recipe was named"
    assert inherit.resolve(None).line == "preset tiny: no recipe was named"


def test_data_that_a_run_no_longer_has(here):
    Path("full/config.toml").write_text(
        Path("full/config.toml").read_text().replace("held.jsonl", "gone.jsonl")
    )
    with pytest.raises(
        DataError,
        match=r"data file not found: .*gone\.jsonl, of run 'full'; give --set measure\.path=FILE",
    ):
        resolved("full")
    Path("lora/config.toml").write_text(
        Path("lora/config.toml").read_text().replace("pairs.jsonl", "gone.jsonl")
    )
    assert "of run 'lora'; give --data FILE" in refused(Path(), "gap", "--model", "lora")
    assert resolved("lora", "data.path=x.jsonl").recipe.data.path == "x.jsonl"
    Path("full/config.toml").write_text("")
    with pytest.raises(
        FolderError, match=r"config\.toml' is damaged: section \[model\] is missing"
    ):
        resolved("full")


def test_a_model_of_ones_own_without_data(here):
    for command in (["train"], ["gap"], ["sample"], ["train", "paper"], ["train", "--out", "x"]):
        said = refused(Path(), *command, "--model", here / "base")
        assert f"model '{here / 'base'}' has no data yet: give --data FILE" in said
    given = ["--model", here / "base", "--backend", "cpu", "--count", 1, "--json"]
    assert json.loads(opd("gap", "--data", "tiny", *given).stdout)["rows"] == 1
    assert (
        json.loads(opd("gap", "--set", f"measure.path={here / 'held.jsonl'}", *given).stdout)[
            "rows"
        ]
        == 1
    )
    assert "nowhere" in refused(
        Path(),
        *"train --model nowhere --data pairs.jsonl --data".split(),
        here / "pairs.jsonl",
    )
    Path("my.toml").write_text("run = 3\n")
    with pytest.raises(
        RecipeError, match=r"--set run\.steps=3: run = 3 in the recipe is no section"
    ):
        inherit.resolve("my.toml", ["run.steps=3"])


def test_a_run_on_data_of_ones_own_does_not_go_on_with_scenes(tmp_path):
    """A run of the embedded model too: where --data is forgotten, its scenes are not what the run
    was trained on."""
    for name, data in (("own", "pairs.jsonl"), ("scenes", "tiny")):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "config.toml").write_text(
            f'[model]\npath = "tiny"\n[data]\npath = "{data}"\n'
        )
    own = tmp_path / "own"
    with pytest.raises(RecipeError, match=r"own' has no data yet: give --data FILE"):
        resolved(own, training=True)
    assert resolved(own, f"data.path={__file__}", training=True).recipe.data.path == __file__
    assert resolved(tmp_path / "scenes", training=True).recipe.data.path == "tiny"


def test_a_misspelt_model_is_told_before_any_picture_is_read(here):
    """Of data that cannot be read nothing is said."""
    Path("pairs.jsonl").write_text("{")
    data = ["--data", "pairs.jsonl"]
    assert "pairs.jsonl:1: not JSON" in refused(Path(), "train", "--model", here / "base", *data)
    assert "no such folder" in refused(Path(), "train", "--model", "nowhere", *data)
    shutil.copytree(here / "base", "broken")
    Path("broken/tokenizer.json").unlink()
    for command in ("train", "gap", "sample"):
        assert "tokenizer.json" in refused(Path(), command, "--model", "broken", *data)


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_checkpoint_is_a_model(here, backend_name, name, tmp_path):
    """For measuring, training and export, on either backend; its student is the one that the run
    had at that step."""
    path = Path(name, "checkpoints/step-000002")
    plain = ["--backend", backend_name, "--json"]
    last, student = (
        json.loads(opd("sample", "--model", model, *plain, "--count", 7).stdout)["answers"]
        for model in (name, path)
    )
    assert last == student
    rows = json.loads(Path(name, "summary.json").read_text())["after"]["rows"]
    assert (
        json.loads(opd("gap", "--model", f"{name}/checkpoints/step-000001", *plain).stdout)["rows"]
        == rows
    )
    more = [
        *"--steps 1 --out more --set measure.count=1 --data".split(),
        here / "pairs.jsonl",
    ]
    opd("train", "--model", path, "--backend", backend_name, *more)
    opd("train", "--resume", "more")
    opd("export", path, "--out", "out")
    ours, theirs = _tensors(path), _tensors(Path(name))
    assert all(np.array_equal(ours[key], value) for key, value in theirs.items())


def _tensors(folder):
    from safetensors.numpy import load_file

    return load_file(next(folder.glob("*/*model.safetensors")))
