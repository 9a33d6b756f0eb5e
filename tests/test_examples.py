"""The examples run, and say what they should."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def said(name, capsys, monkeypatch, *arguments):
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
    assert [line.split()[-1] for line in out.splitlines()[1:]] == ["0.42197", "0.37339", "0.09436", "0.33892", "0.00000"]


def test_a_backend(capsys, monkeypatch):
    toy, wrong, fault = said("05_a_backend.py", capsys, monkeypatch).splitlines()
    passed, checks = re.fullmatch(r"ToyBackend: (\d+) of (\d+) checks passed", toy).groups()
    assert passed == checks
    assert wrong == f"Unclipped: {int(checks) - 1} of {checks} checks passed"
    assert "AdamW" in fault or "adamw" in fault


def test_the_list_names_every_example():
    listed = re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.iterdir() if path.name != "README.md")
