"""`opd train` as a person runs it, on every backend, with the embedded model."""

from __future__ import annotations

import json
import os
import signal
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from opd.data.choices import with_choices
from opd.tiny import Scenes
from opd_cli import main
from tests.conftest import INSTALLED
from tests.support import recorder

FAST = (
    "--set measure.count=4 --set rollout.prompts=2 --set rollout.completions=2 "
    "--set run.checkpoint_every=1"
).split()
TIMES = {
    "seconds_rollout",
    "seconds_accumulate",
    "seconds_apply",
    "tokens_per_second",
    "peak_memory_bytes",
}


def opd(*arguments, code=0):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result


def metrics(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def weights(run):
    from safetensors.numpy import load_file

    return load_file(run / "model/model.safetensors")


@pytest.fixture
def photos(tmp_path):
    """A folder of image files as people have them, and a data file that names them."""
    rows = []
    formats = [
        ("png", {}),
        ("jpg", {"quality": 95}),
        ("webp", {"quality": 90}),
        ("bmp", {}),
        ("gif", {}),
    ]
    for index, (suffix, options) in enumerate(formats):
        scene = Scenes("train", 5)[index]
        scene.images[0].save(tmp_path / f"photo {index}.{suffix}", **options)
        box = scene.boxes[0]
        rows.append(
            {
                "image": f"photo {index}.{suffix}",
                "question": scene.question,
                "boxes": [[box.x0, box.y0, box.x1, box.y1]],
                "answer": scene.answer,
            }
        )
    turned = Scenes("train", 6)[5]
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: viewers rotate it by 90 degrees clockwise
    turned.images[0].rotate(90).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    box = turned.boxes[0]
    rows.append(
        {
            "image": "turned.jpg",
            "question": turned.question,
            "boxes": [[box.x0, box.y0, box.x1, box.y1]],
        }
    )
    scene = Scenes("train", 7)[6]
    scene.images[0].convert("RGBA").save(tmp_path / "whole.png")
    box = scene.boxes[0]
    scene.images[0].crop(
        (int(box.x0) - 6, int(box.y0) - 6, int(box.x1) + 6, int(box.y1) + 6)
    ).resize((48, 48)).save(tmp_path / "crop.png")
    rows.append({"image": "whole.png", "question": scene.question, "teacher_image": "crop.png"})
    rows.append({"image": "missing.png", "question": "Where is it?", "boxes": [[0, 0, 5, 5]]})
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def test_the_default_run(backend_name, tmp_path):
    run = tmp_path / "run"
    result = opd(
        *f"train --backend {backend_name} --steps 3 --out".split(),
        run,
        *"--set measure.every=2".split(),
        *FAST,
    )
    assert "before" in result.stdout
    assert "evidence crop" in result.stdout
    assert "4 examples, 3 steps" in result.stdout
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["backend"], summary["steps"], summary["examples"]) == (backend_name, 3, 4)
    assert {"full_accuracy", "crop_accuracy", "gap", "gap_interval"} <= summary["before"].keys()
    assert [row["step"] for row in metrics(run)] == [1, 2, 3]
    followed = [json.loads(line) for line in (run / "accuracy.jsonl").read_text().splitlines()]
    assert [row["step"] for row in followed] == [0, 2, 3]
    assert (followed[0]["gap"], followed[-1]["gap"]) == (
        summary["before"]["gap"],
        summary["after"]["gap"],
    )
    config = tomllib.loads((run / "config.toml").read_text())
    assert config["run"]["steps"] == 3
    assert config["made_with"]["backend"] == backend_name
    from safetensors.numpy import load_file

    from opd.tiny import MODEL

    before, after = load_file(MODEL / "model.safetensors"), weights(run)
    assert before.keys() == after.keys()
    assert all(before[name].shape == value.shape for name, value in after.items())
    assert sum(not np.array_equal(before[name], value) for name, value in after.items()) == len(
        after
    )


def test_the_trained_model_loads_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    run = tmp_path / "run"
    opd("train", "--backend", "cpu", "--steps", 2, "--out", run, *FAST, "--set", "measure.count=0")
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(run / "model")
    for name, value in weights(run).items():
        np.testing.assert_array_equal(model.state_dict()[name].to(torch.float32).numpy(), value)
    again = opd(
        *"train --backend cpu --model".split(),
        run,
        "--steps",
        1,
        "--out",
        tmp_path / "next",
        *FAST,
        "--json",
    )
    assert json.loads(again.stdout)["steps"] == 1


def test_ones_own_images(backend_name, photos, tmp_path):
    run = tmp_path / "run"
    result = opd(
        *f"train --backend {backend_name} --data".split(),
        photos,
        "--steps",
        4,
        "--out",
        run,
        *FAST,
        "--set",
        "rollout.prompts=4",
    )
    assert "skipped" in result.stderr
    assert "pairs.jsonl:8" in result.stderr
    assert "missing.png" in result.stderr
    assert metrics(run)[-1]["tokens"] > 0
    assert tomllib.loads((run / "config.toml").read_text())["made_with"]["data"]["rows"] == 7
    # A row without an answer cannot be judged; agreement is measured on all rows.
    assert {"agreement", "rows"} <= json.loads((run / "summary.json").read_text())["before"].keys()


def test_answers_are_never_read(backend_name, photos, tmp_path):
    """Completions, losses, divergences, gradient norms and weights are the same without any
    answer."""
    bare = photos.with_name("bare.jsonl")
    rows = [json.loads(line) for line in photos.read_text().splitlines()]
    bare.write_text(
        "".join(
            json.dumps({key: value for key, value in row.items() if key != "answer"}) + "\n"
            for row in rows
        )
    )
    for name, data in (("labelled", photos), ("bare", bare)):
        options = ["--set", "measure.count=0", "--set", "run.rollouts_every=1"]
        opd(
            *f"train --backend {backend_name} --data".split(),
            data,
            "--steps",
            3,
            "--out",
            tmp_path / name,
            *FAST,
            *options,
        )
    assert metrics(tmp_path / "labelled") == metrics(tmp_path / "bare")
    rollouts = [(tmp_path / name / "rollouts.jsonl").read_text() for name in ("labelled", "bare")]
    assert rollouts[0].replace("pairs.jsonl", "bare.jsonl") == rollouts[1]
    ours, theirs = weights(tmp_path / "labelled"), weights(tmp_path / "bare")
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())


def test_resume_goes_on_to_the_same_numbers(backend_name, tmp_path):
    opd("train", "--backend", backend_name, "--steps", 4, "--out", tmp_path / "whole", *FAST)
    arguments = [
        *f"train --backend {backend_name} --steps 4 --out".split(),
        str(tmp_path / "cut"),
        *FAST,
    ]
    opd(*arguments)
    # As if it had been killed after step 2: later checkpoints and the model are gone.
    import shutil

    shutil.rmtree(tmp_path / "cut/model")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000004")
    opd("train", "--resume", tmp_path / "cut")
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(np.array_equal(ours[name], value) for name, value in theirs.items())


def test_a_run_is_resumed_from_any_folder_but_not_on_other_data(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [
        "--data",
        photos.name,
        *"--steps 1 --out run".split(),
        *FAST,
        "--set",
        "measure.count=2",
    ]
    said = opd("train", "--backend", "cpu", *arguments).stderr
    assert "measured on rows that are trained on too" in said
    assert "the embedded tiny model knows nothing but its own scenes" in said
    assert json.loads(Path("run/summary.json").read_text())["rows_skipped"] == 1
    monkeypatch.chdir("/")
    assert "the one step of this run is done" in opd("train", "--resume", tmp_path / "run").stderr
    photos.write_text("".join(photos.read_text().splitlines(keepends=True)[1:]))
    said = opd("train", "--resume", tmp_path / "run", code=2).stderr
    assert said.splitlines()[-1].startswith(f"opd: {photos} is not what this run began with")


def test_ctrl_c_saves_and_resumes(tmp_path):
    """The first Ctrl-C ends the run after its step, with exit code 130 and a checkpoint.
    tests/cli/test_progress.py sends SIGTERM to a process of its own."""
    run, ended = tmp_path / "run", threading.Event()

    def interrupt():
        while not ended.wait(0.01):
            if (run / "checkpoints/step-000001").exists():
                os.kill(os.getpid(), signal.SIGINT)
                return

    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        result = CliRunner().invoke(
            main,
            [
                *"train --backend cpu --steps 10000 --out".split(),
                str(run),
                *FAST,
                "--set",
                "measure.count=0",
            ],
        )
    finally:
        ended.set()
        thread.join()
    assert result.exit_code == 130
    assert "Traceback" not in result.stderr
    last = metrics(run)[-1]["step"]
    stopped = f"opd: stopped after step {last}; go on with: opd train --resume {run}"
    assert result.stderr.splitlines()[-1] == stopped
    assert (run / f"checkpoints/step-{last:06d}/state.json").is_file()


def test_a_run_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short = ["train", "--backend", "cpu", "--steps", "1", *FAST, "--set", "measure.count=0"]
    opd(*short)
    opd(*short)
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["tiny", "tiny-2"]
    assert "holds a run" in opd(*short, "--out", "runs/tiny", code=2).stderr
    opd(*short, "--out", "runs/tiny", "--force")
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        "tiny",
        "tiny-2",
        "tiny~1",
    ]


def test_json_prints_one_object(tmp_path):
    result = opd(
        "train", "--backend", "cpu", "--steps", 1, "--out", tmp_path / "run", *FAST, "--json"
    )
    assert json.loads(result.stdout)["run"] == str(tmp_path / "run")


def test_help_names_every_option_with_a_sentence():
    text = opd("train", "--help").stdout
    for option in (
        "--backend",
        "--model",
        "--data",
        "--out",
        "--steps",
        "--seed",
        "--set",
        "--resume",
        "--force",
        "--json",
    ):
        assert option in text
    assert "Train a model with Vision-OPD" in opd("--help").stdout
    assert opd().stdout == opd("--help").stdout


def test_gap_and_sample_tell_what_the_model_says(backend_name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # wide enough that no answer is folded
    few = ["--backend", backend_name, "--count", 3]
    result = json.loads(opd("gap", *few, "--json").stdout)
    assert (result["rows"], result["backend"]) == (3, backend_name)
    assert result["gap"] == pytest.approx(result["crop_accuracy"] - result["full_accuracy"])
    assert "evidence crop" in opd("gap", *few).stdout
    answers = json.loads(opd("sample", *few, "--json").stdout)["answers"]
    assert sum(one["full_right"] for one in answers) == pytest.approx(3 * result["full_accuracy"])
    assert answers[0]["crop"] in opd("sample", *few).stdout


def test_sample_shows_the_question_with_the_choices_that_the_model_sees(
    backend_name, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    Image.new("RGB", (80, 80), "red").save(tmp_path / "red.png")
    row = {
        "image": "red.png",
        "question": "Which color?",
        "boxes": [[8, 8, 40, 40]],
        "choices": ["red", "blue"],
        "answer": "A",
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    given = ["--backend", backend_name, "--data", tmp_path / "rows.jsonl", "--count", 1]
    (answer,) = json.loads(opd("sample", *given, "--json").stdout)["answers"]
    assert answer["question"] == with_choices("Which color?", ("red", "blue"))
    shown = opd("sample", *given).stdout
    assert all(line in shown for line in answer["question"].splitlines())


@pytest.mark.slow
@pytest.mark.parametrize("backend_name", INSTALLED[-1:])
def test_backends_are_checked_against_committed_numbers(backend_name):
    """tests/cli/test_readme.py checks the first."""
    result = json.loads(opd("backends", backend_name, "--check", "--json").stdout)
    assert [
        check for check in result["backends"][backend_name]["checks"] if not check["passed"]
    ] == []
    assert len(result["backends"][backend_name]["checks"]) == 19
    assert "did you mean 'mlx'?" in opd("backends", "mlxx", code=2).stderr


def test_the_preset_follows_the_model(tmp_path, monkeypatch, installed):
    """`tiny` for the embedded model and whatever was made of it; any other model takes `lora`."""
    from opd.models.choice import is_tiny
    from opd.tiny import MODEL
    from tests.support.random_models import qwen3_vl

    monkeypatch.chdir(tmp_path)
    said = opd(
        "train", "--backend", "cpu", "--steps", 1, "--out", "one", *FAST, "--set", "measure.count=0"
    ).stderr
    assert "preset tiny: no recipe was named" in said
    named = "--backend cpu --steps 1 --out named --set measure.count=0".split()
    assert "preset" not in opd("train", "tiny", *FAST, *named).stderr
    opd("export", "one", "--out", "exported")
    for name, base in {"adapter": "/elsewhere/opd/tiny/model", "other": "org/model"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": base})
        )
    (tmp_path / "second").mkdir()
    (tmp_path / "second/config.toml").write_text('[model]\npath = "one"\n')
    assert all(
        is_tiny(path)
        for path in ("tiny", str(MODEL), "one", "one/model", "exported", "second", "adapter")
    )
    random = qwen3_vl(tmp_path / "random")
    assert not any(is_tiny(str(path)) for path in (random, "org/model", "nowhere", "other"))
    for command in ("gap", "sample"):
        for model, line in {
            MODEL: "preset tiny: no recipe was named",
            "exported": "the recipe of 'exported': tune full",
        }.items():
            assert line in opd(command, "--model", model, "--backend", "cpu", "--count", 1).stderr
        assert (
            "preset"
            not in opd(command, "tiny", "--model", random, "--backend", "cpu", "--count", 1).stderr
        )
    installed(recorder=recorder.load)
    given = ["--data", "tiny", "--backend", "recorder", "--steps", 1, "--set", "measure.count=0"]
    for out, arguments in {
        "a": ["--model", random],
        "b": ["--set", f"model.path={random}"],
    }.items():
        opd("train", *arguments, *given, "--out", out)
        written = tomllib.loads((tmp_path / out / "config.toml").read_text())
        assert written["model"]["tune"] == "lora"
        assert written["optimizer"]["learning_rate"] == 5e-5
