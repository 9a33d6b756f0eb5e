"""The examples run, and say what they should."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

import opd
from opd.plan import Assumed, devices, plan
from opd.run.recipe import load
from opd_cli import main
from tests.plan.test_plan import write_published

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def forgotten(registers):
    """What a script registers is forgotten after the test."""


def said(name, capsys, monkeypatch, *arguments):
    """What a script prints."""
    monkeypatch.setattr("sys.argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_by_hand(capsys, monkeypatch):
    pytest.importorskip("torch")
    out = said("01_by_hand.py", capsys, monkeypatch)
    steps = [float(value) for value in re.findall(r"divergence ([\d.]+)", out)]
    assert len(steps) == 10
    assert all(0 < value < 0.5 for value in steps)
    assert re.search(r"full image: \d+% before, \d+% after\ngap: -?\d+% before, -?\d+% after", out)


def test_divergence(capsys, monkeypatch):
    out = said("03_divergence.py", capsys, monkeypatch)
    assert [line.split()[-1] for line in out.splitlines()[1:]] == [
        "0.42197",
        "0.37339",
        "0.09436",
        "0.33892",
        "0.00000",
    ]


def test_a_backend(capsys, monkeypatch):
    toy, wrong, fault = said("05_a_backend.py", capsys, monkeypatch).splitlines()
    passed, checks = re.fullmatch(r"ToyBackend: (\d+) of (\d+) checks passed", toy).groups()
    assert passed == checks
    assert wrong == f"Unclipped: {int(checks) - 1} of {checks} checks passed"
    assert "AdamW" in fault or "adamw" in fault


def test_a_view(capsys, monkeypatch, tmp_path):
    pytest.importorskip("torch")
    out = said("04_a_view.py", capsys, monkeypatch, str(tmp_path / "seen.png"))
    rows = re.findall(r"^(\w+) +(\d+) of 50 right, (\d+) tokens$", out, flags=re.MULTILINE)
    right = {name: int(count) for name, count, _ in rows}
    tokens = {name: int(size) for name, _, size in rows}
    assert right["full"] + 3 < right["spotlight"] < right["crop"]
    assert tokens["full"] == tokens["spotlight"] > tokens["crop"]
    with Image.open(tmp_path / "seen.png") as seen:
        assert seen.size == (128, 128)


def test_a_format(capsys, monkeypatch):
    box = "Box(x0=20.0, y0=10.0, x1=60.0, y1=40.0, image=0)"
    assert said("06_a_format.py", capsys, monkeypatch).splitlines() == [
        f"table.csv:2: When does it open? {box} 9 am",
        "skipped table.csv:3: a side of the box: could not convert string to float: 'ten'",
    ]


def test_your_images(capsys, monkeypatch, tmp_path):
    """README's commands work, its row is the first, and it names every file of the run."""
    pytest.importorskip("torch")
    folder = EXAMPLES / "02_your_images"
    page = (folder / "README.md").read_text()
    said("02_your_images/make_photos.py", capsys, monkeypatch, str(tmp_path))
    (row,) = re.findall(r"```json\n(.*)\n```", page)
    assert (tmp_path / "pairs.jsonl").read_text().splitlines()[0] == row
    shutil.copy(folder / "recipe.toml", tmp_path)
    monkeypatch.chdir(tmp_path)
    begin, made, *commands = re.search(r"```bash\n(.*?)```", page, flags=re.DOTALL)[1].splitlines()
    assert (begin, made) == ("cd examples/02_your_images", "python make_photos.py")
    few = ["measure.count=4", "measure.max_tokens=8"]
    short = [*few, "run.steps=2", "run.checkpoint_every=1", "rollout.prompts=2"]
    for command in commands:
        words = shlex.split(command)
        sets = [f"--set={one}" for one in (short if words[1] == "train" else few)]
        result = CliRunner().invoke(main, [*words[1:], "--backend", "cpu", *sets])
        assert result.exit_code == 0, f"{command}: {result.output}"
    named = re.findall(r"^\| `([\w.]+)/?` \|", page, flags=re.MULTILINE)
    assert sorted(named) == sorted(path.name for path in (tmp_path / "runs/recipe").iterdir())


def test_the_photographs_have_a_gap_to_close(capsys, monkeypatch, tmp_path):
    """On a quarter of them; the run of README, which closes nearly half of it, takes minutes."""
    pytest.importorskip("torch")
    said("02_your_images/make_photos.py", capsys, monkeypatch, str(tmp_path))
    model = opd.open_model("tiny", backend="cpu")
    gap = opd.measure_gap(model, opd.read_data(tmp_path / "held.jsonl", count=50))
    assert gap.crop_accuracy > 0.85
    assert gap.gap > 0.2


@pytest.mark.parametrize(
    ("name", "model", "device"),
    [
        ("qwen3_vl_2b_mac_16gb", "Qwen3-VL-2B", "M4 16 GB"),
        ("qwen3_vl_4b_lora_24gb", "Qwen3-VL-4B", "RTX 4090"),
        ("qwen3_vl_4b_full_141gb", "Qwen3-VL-4B", "H200"),
    ],
)
def test_recipes_fit_as_they_say(name, model, device, tmp_path):
    """As planned with the sizes that the model's config.json has, which stand in for its files."""
    text = (EXAMPLES / f"recipes/{name}.toml").read_text()
    assert f"opd plan examples/recipes/{name}.toml --device" in text
    assert device in text
    values = tomllib.loads(text)
    assert values["model"]["path"] == f"Qwen/{model}-Instruct"
    pytest.importorskip("mlx" if device.startswith("M") else "torch")
    write_published(tmp_path, model)
    recipe = load(
        str(EXAMPLES / f"recipes/{name}.toml"),
        {"model": {"path": str(tmp_path)}, "data": {"path": "tiny"}},
    )
    number = r"([\d.]+)"
    numbers = f"{number} of {number} GB, {number} s a step, {number} hours"
    planned = re.findall(rf"# planned for photos of (\d+)x(\d+): {numbers}", text)
    assert [size[:2] for size in planned] == [("1024", "768"), ("4000", "3000")]
    for width, height, *said in planned:
        image = int(width), int(height)
        found = plan(recipe, devices.device(device, lambda: None), None, Assumed(image, None))
        peak, usable = found.memory.peak, found.usable
        assert peak <= usable
        numbers = [peak / 1e9, usable / 1e9, sum(found.seconds.values()), found.hours]
        assert numbers == pytest.approx([float(one) for one in said], rel=0.03)


def test_every_script_starts_by_itself():
    """Each names what it needs (PEP 723), with opd from this checkout."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    scripts = sorted(EXAMPLES.rglob("*.py"))
    assert len(scripts) == 7
    for script in scripts:
        match = re.match(r"# /// script\n((?:#.*\n)*?)# ///\n", script.read_text())
        header = tomllib.loads(re.sub(r"^# ?", "", match[1], flags=re.MULTILINE))
        assert header["requires-python"] == project["requires-python"]
        ours = re.fullmatch(r"vision-opd(?:\[(\w+)\])?", header["dependencies"][0])
        assert ours[1] is None or ours[1] in project["optional-dependencies"]
        path = header["tool"]["uv"]["sources"]["vision-opd"]["path"]
        assert (script.parent / path).resolve() == ROOT


def test_the_list_names_every_example():
    listed = re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text())
    there = {path.name for path in EXAMPLES.iterdir()} - {"README.md", "__pycache__"}
    assert sorted(listed) == sorted(there)
