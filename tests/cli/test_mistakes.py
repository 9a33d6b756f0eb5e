"""Everything a person can get wrong on the command line: one line that says what, where and what to
do, exit 2, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from opd.tiny import MODEL
from opd_cli import main
from tests.support import recorder
from tests.support.disk import no_file_above

GOOD = {
    "image": "street.png",
    "question": "What does it say?",
    "boxes": [[10, 10, 30, 20]],
    "answer": "12",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A person's folder: an image, a damaged one, a run, and a data file to be filled."""
    monkeypatch.chdir(tmp_path)
    Image.linear_gradient("L").resize((64, 48)).convert("RGB").save("street.png")
    Path("cut.png").write_bytes(Path("street.png").read_bytes()[:-200])
    Path("text.png").write_text("not an image")
    Path("old").mkdir()
    Path("old/config.toml").write_text("[run]\nsteps = 3\n")
    Path("full").mkdir()
    Path("full/letter.txt").write_text("not a run")
    Path("file").write_text("")
    Path("pairs.jsonl").write_text(json.dumps(GOOD))
    return tmp_path


def content(folder):
    return {
        path.relative_to(folder): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refused(here, *arguments):
    """What `opd` says; holds it to one line, exit code 2, an empty stdout, and an untouched
    folder."""
    before = content(here)
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 2, result.output + repr(result.exception)
    assert result.stdout == ""
    said = result.stderr.splitlines()
    assert len(said) == 1
    assert said[0].startswith("opd: ")
    assert content(here) == before
    assert "Traceback" not in result.stderr
    return said[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "no such command 'trian'; did you mean 'train'?"),
        (["train", "--backend", "gpu"], "unknown backend 'gpu'; known: auto, mlx, cuda, cpu"),
        (["gap", "--backend", "mxl"], "unknown backend 'mxl'; known: auto, mlx, cuda, cpu"),
        (["backends", "torch"], "unknown backend 'torch'; known: cpu, cuda, mlx"),
        (
            ["train", "--backend", "cuda"],
            "backend 'cuda': torch sees no GPU on this machine; use the backend 'cpu'",
        ),
        (
            ["train", "--step", "3"],
            "No such option '--step'. (Did you mean one of: '--seed', '--set', '--steps'?)",
        ),
        (["train", "--steps", "many"], "'many' is not a valid integer"),
        (["train", "--steps", "0"], "run.steps = 0: input should be greater than or equal to 1"),
        (["train", "--seed", "-1"], "run.seed = -1: input should be greater than or equal to 0"),
        (["train", "tiny", "extra"], "Got unexpected extra argument (extra)"),
        (["train", "tinny"], "recipe 'tinny': neither a file nor a preset; did you mean 'tiny'?"),
        (["train", "full"], "recipe 'full': neither a file nor a preset"),
        (["sample", "old"], "'old' is a run folder, no recipe; a model is given with --model old"),
        (
            ["train", "--set", "rollout.promts=3"],
            "unknown key rollout.promts; did you mean 'prompts'?",
        ),
        (["train", "--set", "rolout.prompts=3"], "unknown key rolout; did you mean 'rollout'?"),
        (["train", "--set", "steps=3"], "--set steps=3: write it as section.key=value"),
        (
            ["train", "--set", "teacher.rule=emma"],
            "teacher.rule = 'emma': input should be 'ema', 'frozen', 'sync' or 'live'",
        ),
        (
            ["train", "--set", "teacher.rate=1.5"],
            "teacher.rate = 1.5: input should be less than or equal to 1",
        ),
        (["train", "--set", "optimizer.learning_rate=nan"], "optimizer.learning_rate = nan"),
        (
            ["train", "--set", "objective.alpha=-0.1"],
            "objective.alpha = -0.1: input should be greater than or equal to 0",
        ),
        (["train", "--model", "nowhere"], "model 'nowhere': no such folder"),
        (
            ["train", "--model", "full"],
            "full is not a complete model folder: config.json is missing",
        ),
        (
            ["train", "--model", "old"],
            "model 'old': this run has no model/ yet; finish it with: opd train --resume old",
        ),
        (["sample", "--model", "nowhere"], "model 'nowhere': no such folder"),
        (
            ["sample", "--model", "runs/nowhere"],
            "model 'runs/nowhere': neither a folder here nor in the cache",
        ),
        (
            ["train", "--model", "old", "--set", "model.revision=v1"],
            "model.revision = 'v1': 'old' is a folder, which has no revisions",
        ),
        (
            ["train", "--set", "model.min_pixels=2000", "--set", "model.teacher_max_pixels=1000"],
            "recipe 'tiny': model: the teacher's min_pixels, 2000, is above its max_pixels, 1000",
        ),
        (["train", "--data", "nowhere.jsonl"], "data file not found: nowhere.jsonl"),
        (["train", "--data", "full"], "full is a folder without data: it holds no file"),
        (["train", "--data", "file"], "file: the file is empty"),
        (["train", "--data", "street.png"], "the file is not UTF-8 text"),
        (["gap", "--set", "measure.path=nowhere.jsonl"], "data file not found: nowhere.jsonl"),
        (["gap", "--view", "corp"], "no view is called 'corp'; did you mean 'crop'?"),
        (
            ["train", "--set", "view.mixture={crop = 0.7}"],
            "view.mixture = {'crop': 0.7}: the shares sum to 0.7, not to 1",
        ),
        (["gap", "--count", "0"], "nothing to measure: measure.count is 0"),
        (["sample", "--count", "0"], "Invalid value for '--count': 0 is not in the range x>=1"),
        (
            ["gap", "--count", "-1"],
            "measure.count = -1: input should be greater than or equal to 0",
        ),
        (
            ["train", "pairs.jsonl"],
            "'pairs.jsonl' is no recipe (a TOML file); data is given with --data pairs.jsonl",
        ),
        (
            ["train", "--out", "old"],
            (
                "run folder 'old' holds a run; continue it with --resume, replace it with --force,"
                " or name another"
            ),
        ),
        (
            ["train", "--out", "full"],
            "run folder 'full' exists and is no run; name another with --out",
        ),
        (
            ["train", "--out", "full", "--force"],
            "run folder 'full' exists and is no run; name another with --out",
        ),
        (["train", "--out", "file"], "run folder 'file' is a file; name another with --out"),
        (["train", "--out", "file/run"], "run folder 'file/run' cannot be written"),
        (["train", "--resume", "nowhere"], "run folder 'nowhere' not found"),
        (["train", "--resume", "full"], "'full' is no run folder: it has no config.toml"),
        (["train", "--resume", "old", "--seed", "5"], "--resume goes on with the run's own recipe"),
    ],
)
def test_arguments(here, arguments, message):
    if "cuda" in arguments:
        torch = pytest.importorskip("torch")
        if torch.cuda.is_available():
            pytest.skip("torch sees a GPU")
    assert message in refused(here, *arguments)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"image": "street.png",'], "pairs.jsonl:1: not JSON"),
        (["[1, 2]"], "pairs.jsonl:1: a row is a JSON object, but this is a list"),
        ([{**GOOD, "image": None}], "pairs.jsonl:1: field 'image' is missing"),
        (
            [{"img": "street.png", "question": "?", "boxes": [[1, 2, 3, 4]]}],
            "the row has 'img'; did you mean 'image'?",
        ),
        ([{**GOOD, "question": None}], "pairs.jsonl:1: field 'question' is missing"),
        ([{**GOOD, "question": " "}], "field 'question': \" \" is not a text that is not empty"),
        ([{**GOOD, "boxes": None}], "pairs.jsonl:1: field 'boxes' is missing"),
        ([{**GOOD, "image": "nowhere.png"}], "image not found: nowhere.png"),
        ([{**GOOD, "image": "text.png"}], "image cannot be read: text.png: not an image"),
        ([{**GOOD, "image": "cut.png"}], "image cannot be read: cut.png"),
        (
            [{**GOOD, "boxes": [[10, 10, 90, 20]]}],
            "box [10, 10, 90, 20] is outside the image of 64 x 48 pixels",
        ),
        ([{**GOOD, "boxes": [[30, 10, 10, 20]]}], "box [30, 10, 10, 20] is empty or inverted"),
        ([{**GOOD, "boxes": [[10, 10, 10, 20]]}], "box [10, 10, 10, 20] is empty or inverted"),
        (['{"image": "street.png", "question": "?", "boxes": [[1, 2, NaN, 4]]}'], "is not finite"),
        ([{**GOOD, "boxes": [[1, 2, 3]]}], "is not a box of four numbers"),
        (
            [{**GOOD, "boxes": [{"image": 1, "box": [1, 2, 3, 4]}]}],
            "image 1 of box [1, 2, 3, 4] is not among the row's 1 image",
        ),
        ([{**GOOD, "box_format": "percent"}], "field 'box_format': unknown value \"percent\""),
        ([{**GOOD, "weight": -1}], "field 'weight': -1 is not a number of at least 0"),
        (
            [{**GOOD, "choices": ["red", "blue"]}],
            "is neither a letter nor the text of one of the 2 choices",
        ),
    ],
)
@pytest.mark.parametrize("strict", [False, True], ids=["last-row", "strict"])
def test_rows(here, rows, message, strict):
    """A fault of a row is fatal where no row is left, and in strict mode."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    text = "".join(f"{line}\n" for line in (*lines, *([json.dumps(GOOD)] if strict else [])))
    Path("pairs.jsonl").write_text(text)
    said = refused(
        here, "train", "--data", "pairs.jsonl", *(["--set", "data.strict=true"] if strict else [])
    )
    assert message in said
    assert ("strict mode" if strict else "no usable row of 1") in said


def test_a_picture_above_the_bound(here):
    Path("pairs.jsonl").write_text(json.dumps(GOOD))
    said = refused(here, "train", "--data", "pairs.jsonl", "--set", "data.max_image_pixels=1000")
    assert "street.png: 64 x 48 = 3072 pixels, above data.max_image_pixels = 1000; raise it" in said


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run\nsteps = 3", "recipe 'my.toml' is not valid TOML"),
        ("[run]\nstep = 3", "recipe 'my.toml': unknown key run.step; did you mean 'steps'?"),
        ("[view]\nkind = 'corp'", "view.kind = 'corp'"),
    ],
)
def test_recipes(here, text, message):
    Path("my.toml").write_text(text)
    assert message in refused(here, "train", "my.toml")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda model: (model / "model.safetensors").unlink(), "no model.safetensors"),
        (
            lambda model: (model / "model.safetensors").write_bytes(b"half"),
            "cannot be read as safetensors",
        ),
        (
            lambda model: (model / "tokenizer.json").unlink(),
            "is not a complete model folder: tokenizer.json or vocab.json is missing",
        ),
        (
            lambda model: (model / "preprocessor_config.json").unlink(),
            "is not a complete model folder: preprocessor_config.json",
        ),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
        (
            lambda model: set_model_type(model, "llama"),
            "model_type 'llama' is not supported; supported: gemma3, idefics3,",
        ),
    ],
)
def test_models(here, backend_name, spoil, message):
    model = here / "model"
    shutil.copytree(MODEL, model)
    spoil(model)
    assert message in refused(here, "train", "--backend", backend_name, "--model", "model")


def set_model_type(model, name):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": name}))


@pytest.fixture
def runs(here):
    """Runs that are new, finished, of an adapter, and with a checkpoint that is damaged."""
    for name, recipe in {
        "new": "[run]\nsteps = 3\n",
        "lora": '[model]\ntune = "lora"\n',
        "done": "",
    }.items():
        Path(name).mkdir()
        Path(name, "config.toml").write_text(recipe)
    shutil.copytree(MODEL, "done/model")
    Path("cut/checkpoints/step-000001").mkdir(parents=True)
    Path("cut/config.toml").write_text("")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--out", "out"], "run folder 'nowhere' not found"),
        (["done"], "Missing option '--out'"),
        (["done", "--out", "full"], "folder 'full' is not empty; name another with --out"),
        (
            ["done", "--out", "file"],
            "folder 'file' cannot be written: file is not a folder; name another with --out",
        ),
        (["done", "--out", "file/out"], "folder 'file/out' cannot be written: "),
        (
            ["new", "--out", "out"],
            (
                "run 'new' has neither model/ nor a checkpoint yet; go on with it: opd train"
                " --resume new"
            ),
        ),
        (
            ["done", "--out", "out", "--as", "adapter"],
            "run 'done' trained all weights, so it has no adapter; export it with --as model",
        ),
        (
            ["lora", "--out", "out", "--as", "adapter", "--quantize", "4"],
            "--quantize is for --as model",
        ),
        (
            ["lora", "--out", "out", "--as", "adapter"],
            "run 'lora' has neither adapter/ nor a checkpoint yet",
        ),
        (["done", "--out", "out", "--quantize", "5"], "'5' is not one of '4', '8'"),
        (["done", "--out", "out", "--as", "gguf"], "'gguf' is not one of 'model', 'adapter'"),
        (["cut", "--out", "out", "--backend", "cpu"], "step-000001: no student.safetensors"),
        (
            ["cut", "--out", "out", "--backend", "gpu"],
            "unknown backend 'gpu'; known: auto, mlx, cuda, cpu",
        ),
    ],
)
def test_exports(here, runs, arguments, message):
    assert message in refused(here, "export", *arguments)


@pytest.fixture
def without(monkeypatch):
    """Packages are as if they were not installed."""

    def remove(*packages):
        for package in packages:
            monkeypatch.setitem(sys.modules, package, None)

    return remove


def test_quantising_needs_mlx(here, runs, without):
    without("mlx")
    said = refused(here, "export", "done", "--out", "out", "--quantize", 4)
    assert (
        said
        == "opd: backend 'mlx' needs mlx, which is not installed: pip install \"vision-opd[mlx]\""
    )


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("mlx", "mlx", "mlx"), ("cpu", "torch", "cuda"), ("cuda", "torch", "cuda")],
)
def test_a_backend_that_is_not_installed_names_its_extra(here, without, name, package, extra):
    without(package)
    assert refused(here, "train", "--backend", name).endswith(
        f"backend '{name}' needs {package}, which is not installed: pip install"
        f' "vision-opd[{extra}]"'
    )


def test_no_backend_at_all(here, without):
    without("mlx", "torch")
    assert 'no backend is installed: pip install "vision-opd[mlx]"' in refused(here, "train")


@pytest.mark.parametrize("force", [False, True])
def test_a_full_disk_leaves_nothing_behind(here, installed, force):
    installed(recorder=recorder.load)
    out = ["old", "--force"] if force else ["new/run"]
    with no_file_above(100):
        said = refused(here, "train", "--backend", "recorder", "--out", *out)
    assert (
        f"run folder '{out[0]}' cannot be written: File too large; name another with --out" in said
    )
    assert sorted(path.name for path in here.iterdir() if path.is_dir()) == ["full", "old"]


def test_an_unwritable_folder(here, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "run folder 'runs/tiny' cannot be written" in refused(here, "train")


class Filling(recorder.Recorder):
    """From step 3 on, nothing more can be added to the metrics of run/."""

    def apply(self, update):
        if sum(call.name == "apply" for call in self.calls) == 2:
            Path("run/metrics.jsonl").unlink()
            Path("run/metrics.jsonl").symlink_to("/dev/full")
        return super().apply(update)


def filling(options):
    return Filling(options, recorder.letters)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_disk_that_fills_up_during_the_run_keeps_what_was_saved(here, installed):
    """Not the person's mistake: exit 1, still one line, and everything up to the last checkpoint is
    there."""
    installed(filling=filling)
    options = (
        "--backend filling --steps 5 --out run"
        " --set measure.count=0 --set rollout.prompts=2 --set run.checkpoint_every=1"
    ).split()
    result = CliRunner().invoke(main, ["train", *options])
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        "opd: 'run/metrics.jsonl' cannot be written: No space left on device; what was saved"
        " before stays"
    )
    assert (here / "run/checkpoints/step-000002/state.json").is_file()


def test_no_traceback_reaches_a_terminal(here):
    """The installed command itself, not only its test runner."""
    root = Path(__file__).parents[2]
    environment = {
        "PYTHONPATH": f"{root}:{root / 'backends'}:{root / 'cli'}",
        "PATH": "/usr/bin:/bin",
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [sys.executable, "-m", "opd_cli", "train", "--model", "nowhere"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "opd: model 'nowhere': no such folder; give a folder in Hugging Face layout, a run"
        " folder, a Hugging Face id, or 'tiny'\n"
    )


def test_windows_is_told_what_runs_there(here, monkeypatch):
    """Before any module is imported that only POSIX has."""
    monkeypatch.setattr(sys, "platform", "win32")
    line = refused(here, "train")
    assert line == (
        "opd: Windows is not supported; install and run opd inside WSL, the Windows Subsystem"
        " for Linux"
    )
    assert "on Windows, inside WSL" in (Path(__file__).parents[2] / "README.md").read_text()
