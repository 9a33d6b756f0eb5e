"""A run goes on with what it began with, or says what is not the same; and it goes on further than
it was meant to."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

from opd.run import fingerprints
from opd.tiny import MODEL
from tests.cli.test_mistakes import content
from tests.cli.test_train import FAST, metrics, opd, photos, weights

QUICK = ["--backend", "cpu", *FAST, "--set", "measure.count=2"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of two steps on one's own model and data, measured on a file of its own, to be
    copied."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(MODEL, folder / "base")
    photos.__wrapped__(folder)
    shutil.copy(folder / "pairs.jsonl", folder / "held.jsonl")
    arguments = [
        "--model",
        folder / "base",
        "--data",
        folder / "pairs.jsonl",
        "--out",
        folder / "run",
        "--steps",
        2,
        *QUICK,
    ]
    options = [
        f"measure.path={folder / 'held.jsonl'}",
        "optimizer.schedule=constant",
        "optimizer.warmup_steps=0",
    ]
    opd("train", "tiny", *arguments, *(word for option in options for word in ("--set", option)))
    return folder


@pytest.fixture
def own(made, tmp_path, monkeypatch):
    """A copy of that run and all that it needs, in the current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    config = (tmp_path / "run/config.toml").read_text()
    (tmp_path / "run/config.toml").write_text(config.replace(str(made), str(tmp_path)))
    return tmp_path / "run"


def refused(folder, *arguments):
    before = content(folder)
    result = opd("train", "--resume", folder, *arguments, code=2)
    assert result.stdout == ""
    assert content(folder) == before
    return result.stderr.splitlines()[-1]


def edit(run, old, new):
    config = (run / "config.toml").read_text()
    assert old in config
    (run / "config.toml").write_text(config.replace(old, new))


def replace_weights(own):
    from safetensors.numpy import load_file, save_file

    tensors = load_file("base/model.safetensors")
    name = max(tensors)
    save_file(
        {**tensors, name: tensors[name] + 1}, "base/model.safetensors", metadata={"format": "pt"}
    )


def append(file, text=" "):
    with Path(file).open("a") as opened:
        opened.write(text)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (replace_weights, "/base is not what this run began with (model.safetensors has changed)"),
        (
            lambda own: append("base/tokenizer.json"),
            "/base is not what this run began with (tokenizer.json has changed)",
        ),
        (lambda own: append("base/config.json"), "(config.json has changed)"),
        (
            lambda own: append("base/preprocessor_config.json"),
            "(preprocessor_config.json has changed)",
        ),
        (
            lambda own: Path("base/generation_config.json").unlink(),
            "(generation_config.json is gone)",
        ),
        (
            lambda own: Path("base/special_tokens_map.json").write_text("{}"),
            "(special_tokens_map.json is new)",
        ),
        (
            lambda own: append("held.jsonl", "\n"),
            "/held.jsonl is not what this run began with (a line or an image has changed)",
        ),
        (
            lambda own: shutil.copy("photo 1.jpg", "photo 0.png"),
            "/pairs.jsonl is not what this run began with (a line or an image",
        ),
        (
            lambda own: edit(own, "rank = 32", "rank = 8"),
            "config.toml is not what this run began with (model.rank = 8, was 32)",
        ),
        (lambda own: edit(own, "seed = 0", "seed = 1"), "(run.seed = 1, was 0)"),
        (lambda own: edit(own, "steps = 2", "steps = 9"), "(run.steps = 9, was 2)"),
    ],
)
def test_what_has_changed_is_refused_by_name(own, change, said):
    change(own)
    line = refused(own)
    assert said in line
    assert line.endswith("; restore it, or go on all the same with --accept-changes")


def test_accepted_changes_are_what_the_run_has_from_then_on(own):
    append("held.jsonl", "\n")
    edit(own, "keep = 2", "keep = 3")
    line = refused(own)
    assert "config.toml is not what this run began with (run.keep = 3, was 2); " in line
    assert (
        "held.jsonl is not what this run began with (a line or an image has changed); restore it"
        in line
    )
    said = opd("train", "--resume", own, "--accept-changes").stderr
    assert "accepted: " in said
    assert "run.keep = 3, was 2" in said
    (entry,) = json.loads((own / "inputs.json").read_text())["history"]
    assert entry["step"] == 2
    assert len(entry["changes"]) == 2
    assert "accepted: " not in opd("train", "--resume", own).stderr
    assert "accept-changes is for --resume" in opd("train", "--accept-changes", code=2).stderr


def test_an_adapter_of_another_rank_does_not_fit(backend_name, tmp_path):
    run = tmp_path / "run"
    lora = ["--set", "model.tune=lora", "--set", "model.vision=false", "--set", "model.rank=4"]
    opd(
        *f"train --backend {backend_name} --steps 1 --out".split(),
        run,
        *FAST,
        *lora,
        "--set",
        "measure.count=0",
    )
    edit(run, "rank = 4", "rank = 2")
    assert "model.rank = 2, was 4" in refused(run)
    line = refused(run, "--accept-changes")
    assert "does not fit what has changed" in line
    assert "model.rank = 2, was 4" in line


@pytest.mark.parametrize("keep", [0, 300])
def test_a_damaged_config_is_no_other_recipe(own, keep):
    config = (own / "config.toml").read_text()
    whole = config[: config.index("[view]") if keep else 0]
    (own / "config.toml").write_text(whole)
    for command in (
        ["train", "--resume", own],
        ["train", "--resume", own, "--accept-changes"],
        ["export", own, "--out", "out"],
    ):
        line = opd(*command, code=2).stderr.splitlines()[-1]
        assert "config.toml' is damaged: section [" in line
        assert "is missing" in line
    assert (own / "config.toml").read_text() == whole
    (own / "inputs.json").write_text("{")
    assert "inputs.json' is damaged" in refused(own)
    (own / "inputs.json").unlink()
    if not keep:
        assert "is damaged: it holds no section of a recipe" in refused(own)


@pytest.mark.parametrize("name", ["answers.jsonl", "skipped.jsonl"])
def test_damaged_records_are_told_before_anything_is_opened(own, name):
    append(own / name, "{}\n")
    shutil.rmtree("base")
    assert f"{name}' is damaged at line " in refused(own)


def test_a_run_of_an_earlier_version_has_no_fingerprints(own):
    (own / "inputs.json").unlink()
    append("held.jsonl", "\n")
    opd("train", "--resume", own)
    assert "held.jsonl" not in opd("train", "--resume", own).stderr
    append("held.jsonl", "\n")  # from now on it is held
    assert "held.jsonl is not what this run began with" in refused(own)
    append("pairs.jsonl", "\n")
    (own / "inputs.json").unlink()
    assert "pairs.jsonl is not what this run began with" in refused(own)


def test_what_has_moved_is_named(own):
    Path("moved").mkdir()
    for file in [file for file in Path().iterdir() if file.is_file()]:
        shutil.move(file, "moved")
    assert "data file not found: " in refused(own)
    assert refused(own).endswith("where it was moved, give --data FILE")
    data = ["--data", "moved/pairs.jsonl"]
    assert refused(own, *data).endswith("where it was moved, give --set measure.path=FILE")
    shutil.move("base", "moved/base")
    data += ["--set", "measure.path=moved/held.jsonl"]
    assert refused(own, *data).endswith("where it was moved, give --model FOLDER")
    data += ["--model", "moved/base"]
    append("moved/base/tokenizer.json")
    assert "moved/base is not what this run began with (tokenizer.json has changed)" in refused(
        own, *data
    )
    shutil.copy(MODEL / "tokenizer.json", "moved/base")
    opd("train", "--resume", own, *data)
    config = tomllib.loads((own / "config.toml").read_text())
    assert [config[name]["path"] for name in ("data", "measure", "model")] == [
        str(Path("moved", name).resolve()) for name in ("pairs.jsonl", "held.jsonl", "base")
    ]
    opd("train", "--resume", own)


def test_mistakes_beside_resume(own):
    for arguments, said in {
        ("--model", own): "/run is not what this run began with",
        (
            "--data",
            "held.jsonl",
            "--steps",
            1,
        ): "has done 2 steps: --steps 1 would be fewer; give 2 or more",
        ("--seed", 0): "so --seed has no place beside it",
        ("paper",): "so RECIPE has no place beside it",
        ("--out", "other"): "so --out has no place beside it",
        ("--set", "model.rank=3"): "so --set model.rank has no place beside it",
        ("--steps", 0): "has done 2 steps: --steps 0 would be fewer",
    }.items():
        assert said in refused(own, *arguments)
    for arguments in (["--model", own, "--resume"], ["--model", own, "--resume", "--steps", 5]):
        assert "--resume" in opd("train", *arguments, code=2).stderr
    assert "is a checkpoint of run" in refused(own / "checkpoints/step-000002")
    shutil.rmtree(own / "checkpoints")
    assert (
        "has model/, but no checkpoint to go on from; train its result on with: opd train --model"
        in refused(own)
    )


def test_a_run_goes_further_to_the_same_numbers(backend_name, tmp_path):
    """With a constant rate, what a run begun with more steps gives, to the bit."""
    constant = ["--set", "optimizer.schedule=constant", "--backend", backend_name, *FAST]
    opd("train", "--steps", 4, "--out", tmp_path / "whole", *constant)
    run = tmp_path / "run"
    opd("train", "--steps", 2, "--out", run, *constant)
    shorter = json.loads((run / "summary.json").read_text())
    said = opd("train", "--resume", run, "--steps", 4).stderr
    assert "run.steps is 4 from now on, not 2" in said
    assert "learning rate" not in said
    assert metrics(run) == metrics(tmp_path / "whole")
    ours, theirs = weights(run), weights(tmp_path / "whole")
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())
    summary = json.loads((run / "summary.json").read_text())
    assert (shorter["steps"], summary["steps"]) == (2, 4)
    assert summary["after"] == json.loads((tmp_path / "whole/summary.json").read_text())["after"]
    rows = [json.loads(line) for line in (run / "accuracy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert {key: value for key, value in rows[1].items() if key != "step"} == shorter["after"]
    assert tomllib.loads((run / "config.toml").read_text())["run"]["steps"] == 4
    assert [
        entry["step"] for entry in json.loads((run / "inputs.json").read_text())["history"]
    ] == [2]
    opd("train", "--resume", run)  # and needs no --accept-changes


def test_a_schedule_that_ends_says_what_changes(tmp_path):
    run = tmp_path / "run"
    cosine = ["--set", "optimizer.schedule=cosine", "--set", "optimizer.warmup_steps=0", *QUICK]
    opd("train", "--steps", 3, "--out", run, *cosine)
    said = opd("train", "--resume", run, "--steps", 4).stderr
    rates = [row["learning_rate"] for row in metrics(run)]
    assert f"the learning rate, {rates[2]:.2g} at step 3, goes on at {rates[3]:.2g}" in said
    assert "the result is not that of a run begun with 4 steps" in said


def test_every_checkpoint_can_be_exported(tmp_path, monkeypatch):
    """Also right after a run was told to go further, whose result is of fewer steps then."""
    monkeypatch.chdir(tmp_path)
    opd("train", "--steps", 3, "--out", "run", *QUICK)
    assert json.loads(opd("export", "run", "--out", "last", "--json").stdout)["step"] == 3
    assert (
        json.loads(opd("export", "run", "--out", "two", "--step", 2, "--json").stdout)["step"] == 2
    )
    assert (
        json.loads(opd("export", "run/checkpoints/step-000002", "--out", "same", "--json").stdout)[
            "step"
        ]
        == 2
    )
    assert Path("two/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    assert Path("two/model.safetensors").read_bytes() != Path("last/model.safetensors").read_bytes()
    line = opd("export", "run", "--out", "none", "--step", 1, code=2).stderr
    assert line == "opd: run 'run' has no checkpoint of step 1; it has those of: 2, 3\n"
    # Begun to go further, and stopped.
    config = Path("run/config.toml").read_text().replace("steps = 3", "steps = 9")
    Path("run/config.toml").write_text(config)
    result = opd("export", "run", "--out", "still", "--json")
    assert json.loads(result.stdout)["step"] == 3
    assert "run 'run' is not finished: exporting model/ of step 3, of 9" in result.stderr
    assert (
        Path("still/model.safetensors").read_bytes() == Path("last/model.safetensors").read_bytes()
    )
    shutil.copytree("run/checkpoints/step-000003", "run/checkpoints/step-000004")
    assert (
        "exporting its checkpoint of step 4, of 9" in opd("export", "run", "--out", "newer").stderr
    )


def test_a_large_file_is_read_in_parts(tmp_path):
    """Head, end and blocks between them; a file without content takes no room on the disk."""
    file, size = tmp_path / "large", fingerprints.WHOLE_BYTES + 100_000
    last = size - fingerprints.BLOCK_BYTES
    middle = 1000 * last // (fingerprints.BLOCKS - 1)  # where one of the blocks begins
    seen = set()
    for place in (None, 0, fingerprints.HEAD_BYTES - 1, middle, size - 1):
        with file.open("wb") as written:
            written.truncate(size)
            if place is not None:
                written.seek(place)
                written.write(b"1")
        seen.add(fingerprints.of_file(file))
    os.truncate(file, size + 1)
    seen.add(fingerprints.of_file(file))
    assert len(seen) == 6
