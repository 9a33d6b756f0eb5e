"""Every command of the README works as it stands there, in a folder with the files it names; long ones with --steps 5."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from opd_cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
FEW = ["--set", "measure.count=8", "--set", "measure.max_tokens=8"]
SHORT = [*FEW, "--set", "rollout.prompts=4", "--set", "rollout.completions=2", "--set", "rollout.max_tokens=8"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGES = {"street.jpg": (1280, 960), "a.png": (200, 150), "b.png": (200, 150), "menu.jpg": (640, 480), "menu-soup.jpg": (120, 60)}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands():
    lines = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_has_the_commands():
    assert [command[:2] for command in commands()].count(["opd", "train"]) >= 3
    assert {command[0] for command in commands()} == {"make", "opd", "source"}


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The model that the README names, as if it had been downloaded: a random one of its architecture."""
    from huggingface_hub import constants

    from tests.support.random_models import qwen3_vl

    repository = tmp_path / "cache/models--Qwen--Qwen3-VL-2B-Instruct"
    qwen3_vl(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_the_commands_of_opd(tmp_path, monkeypatch, cached):
    monkeypatch.chdir(tmp_path)
    for name, size in IMAGES.items():
        Image.linear_gradient("L").resize(size).convert("RGB").save(name)
    (rows,) = blocks("json")
    for name in ("pairs.jsonl", "more.jsonl", "held-out.jsonl"):
        Path(name).write_text(rows)
    Path("my.toml").write_text("[run]\nsteps = 5\n")
    for command in commands():
        if command[0] != "opd":
            continue
        arguments = command[1:]
        if "--check" not in arguments:
            arguments += ["--backend", "cpu"]
            if "--resume" not in arguments and arguments[0] != "export":
                arguments += SHORT if arguments[0] == "train" or "--measure" in arguments else FEW
        if arguments[0] == "train" and ("--resume" not in arguments or "--steps" in arguments):
            arguments += ["--steps", "6" if "--resume" in arguments else "5"]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, f"{' '.join(command)}: {result.output} {result.exception!r}"
        assert "skipped" not in result.stderr
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "more", "my"}


@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="make install was not run here")
def test_make_train_shows_the_table_that_the_readme_shows(tmp_path):
    """The same rows and columns; the numbers are those of the whole run."""
    (shown,) = (block for block in blocks("text") if "evidence crop" in block)
    arguments = f"ARGS=--steps 5 --out {tmp_path / 'run'} {' '.join(SHORT)}"
    done = subprocess.run(["make", "train", "BACKEND=cpu", arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    for words in ("before", "after", "change", "full image", "evidence crop", "gap", "agreement", "gap closed:", "model:", "metrics:"):
        assert words in shown
        assert words in done.stdout


def test_the_files_that_the_readme_names_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 8
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
