"""README's commands, and those of docs/training.md, work as they stand there.

They run in a folder with the files that they name, on small images and for two steps.
"""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from opd_cli import main

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
DATA = (ROOT / "docs/data.md").read_text()
SETTINGS = {
    "gap": ["measure.count=8", "measure.max_tokens=8", "model.max_pixels=65536"],
    "train": ["rollout.prompts=4", "rollout.completions=2", "rollout.max_tokens=8"],
}
SHORT = [word for key in ("gap", "train") for one in SETTINGS[key] for word in ("--set", one)]
FEW = SHORT[: 2 * len(SETTINGS["gap"])]
PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
IMAGES = {
    "street.jpg": (1280, 960),
    "a.png": (200, 150),
    "b.png": (200, 150),
    "menu.jpg": (640, 480),
    "menu-soup.jpg": (120, 60),
}


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page):
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_the_readme_has_the_commands():
    given = commands(README)
    assert [command[:2] for command in given].count(["opd", "train"]) >= 3
    assert {command[0] for command in given} == {"make", "opd", "pip", "source"}
    assert {command[0] for command in commands(TRAINING)} == {"opd"}


def test_the_readme_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120
    written = re.sub(r"```text\n.*?```", "", README, flags=re.DOTALL).splitlines()
    assert [line for line in written if len(line) > 100 and not line.startswith("|")] == []


def test_pip_installs_what_the_package_offers():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [command[2] for command in commands(README) if command[:2] == ["pip", "install"]]
    assert named == [".[mlx]", ".[cuda]"]
    assert {name[2:-1] for name in named} <= extras["optional-dependencies"].keys()


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """The model that README names, as if it had been downloaded: a random one of its kind."""
    from tests.support import fake_hub
    from tests.support.random_models import qwen3_vl

    repository = tmp_path / "cache/models--Qwen--Qwen3-VL-2B-Instruct"
    qwen3_vl(repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(COMMIT)
    fake_hub.use(monkeypatch, tmp_path / "cache")


def shortened(command):
    """The command's words after `opd`, for the CPU and with little work."""
    words = command[1:]
    if words[0] == "backends":  # tests/cli/test_train.py checks the other backend
        return [*words, "cpu"]
    if words[0] == "data":  # no device
        return words
    words += ["--backend", "cpu"]
    if words[0] == "export" or words[:2] == ["train", "--resume"]:
        return words if "--steps" not in words else [*words, "--steps", "3"]
    words += SHORT if words[0] == "train" or "--measure" in words else FEW
    return [*words, "--steps", "2"] if words[0] == "train" else words


def test_the_commands_of_opd(tmp_path, monkeypatch, cached):
    monkeypatch.chdir(tmp_path)
    for name, size in IMAGES.items():
        Image.linear_gradient("L").resize(size).convert("RGB").save(name)
    rows = "".join([*blocks(README, "json"), *blocks(DATA, "json")])
    for name in ("pairs.jsonl", "more.jsonl", "held-out.jsonl"):
        Path(name).write_text(rows)
    Path("my.toml").write_text("[run]\nsteps = 5\n")
    for command in [*commands(README), *commands(TRAINING)]:
        if command[0] != "opd":
            continue
        result = CliRunner().invoke(main, shortened(command))
        assert result.exit_code == 0, f"{shlex.join(command)}: {result.output} {result.exception!r}"
        assert "skipped" not in result.stderr
        assert "--check" not in command or "19 of 19 checks passed" in result.stdout
    assert {path.name for path in Path("runs").iterdir()} == {"mine", "more", "my"}


@pytest.mark.skipif(not (ROOT / ".venv/installed").exists(), reason="make install was not run here")
def test_make_train_shows_the_table_that_the_readme_shows(tmp_path):
    """The same rows and columns; the numbers are those of the whole run."""
    (shown,) = (block for block in blocks(README, "text") if "evidence crop" in block)
    arguments = f"ARGS=--steps 5 --out {tmp_path / 'run'} {' '.join(SHORT)}"
    make = ["make", "train", "BACKEND=cpu", arguments]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    rows = ("full image", "evidence crop", "gap", "agreement", "gap closed:", "model:", "metrics:")
    for words in ("before", "after", "change", *rows):
        assert words in shown
        assert words in done.stdout


@pytest.mark.parametrize("page", PAGES)
def test_the_files_that_a_page_names_are_there(page):
    text = (ROOT / page).read_text()
    links = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", text)
    folder = (ROOT / page).parent
    assert [link for link in links if ":" not in link and not (folder / link).exists()] == []
    assert len(links) > 8 or page != "README.md"


def test_the_tree_in_the_readme_is_there():
    tree = README.split("## Where things are")[1].split("```")[1]
    assert len(tree.splitlines()) > 8
    for line in tree.strip().splitlines():
        parent = ROOT / "opd" if line.startswith("  ") else ROOT
        names = re.split(r"  +", line.strip())[:-1]
        assert names
        assert [name for name in names if not (parent / name).exists()] == []


ROOMS = ("data", "method", "models", "plan", "prompts", "run", "views")
FOLDERS = {
    **{f"opd/{room}": "" for room in ROOMS},
    "backends/opd_torch": "",
    "backends/opd_mlx": "",
    "cli": "opd_cli",
}
"""Folders of many files, whose page names each of them, and where the files are in the folder."""


@pytest.mark.parametrize(("folder", "inner"), FOLDERS.items())
def test_a_folder_of_many_files_has_a_page_that_names_them(folder, inner):
    page = (ROOT / folder / "README.md").read_text()
    named = set(re.findall(r"`([\w.]+(?:\.py|\.csv|/))`", page))
    files = {path.name for path in (ROOT / folder / inner).glob("*.py")} - {"__init__.py"}
    assert files - named - {"__main__.py"} == set()
    places = (ROOT / folder / inner, ROOT / folder, ROOT / "opd", ROOT)
    assert [name for name in named if not any((place / name).exists() for place in places)] == []
    assert "may import" in page or "imports" in page


def texts(tree):
    """Every string of a module; what an f-string fills in is a NUL."""
    within = set()  # the parts of f-strings, which ast.walk gives after their whole
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            within |= {id(part) for part in ast.walk(node)}
            parts = [getattr(part, "value", "") for part in node.values]
            yield "".join(part if isinstance(part, str) else "\0" for part in parts)
        elif id(node) not in within and isinstance(getattr(node, "value", None), str):
            yield node.value


def test_the_messages_that_troubleshooting_explains_are_in_the_source():
    modules = [path for room in ("opd", "backends", "cli") for path in (ROOT / room).rglob("*.py")]
    said = "\n".join(text for path in modules for text in texts(ast.parse(path.read_text())))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    titles = re.findall(r"^\*\*`.*?`\*\*.*?(?=\n\n|\Z)", page, flags=re.DOTALL | re.MULTILINE)
    quoted = [one for title in titles for one in re.findall(r"\*\*`(.*?)`\*\*", title, re.DOTALL)]
    assert len(quoted) > 30
    wanted = [part.strip() for one in quoted for part in one.replace("\n", " ").split("...")]
    assert [part for part in wanted if part not in said] == []
