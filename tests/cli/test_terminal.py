"""Nothing that data, a model or an argument holds steers the terminal, and no console breaks a
command."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import unicodedata
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import opd_cli
import opd_cli.data
from opd.measure import gap
from opd.run import recipe as recipes
from opd.run.folder import RunFolder
from opd.run.strict_json import dumps
from opd_cli import main, suggestions, terminal
from opd_cli.console import Terminal
from opd_cli.tables import answers, before_after, measured
from opd_cli.terminal import one_line, visible
from tests.support import plugins

ROOT = Path(__file__).parents[2]

HOSTILE = [
    "\x1b[31mred\x1b[0m",
    "\x1b]8;;http://x\x07link\x1b]8;;\x07",
    "\x1b]52;c;AAAA\x1b\\",
    "\x9b2J\x90q\x9c",
    "\x1bP+q\x1b\\\x1b_x\x1b\\",
    "\x07\x08\x0b\x0c\x0e\x7f\x85",
    "100\rX",
    "a\nopd: done",
    "gnp.\u202eexe\u202c\u2066x\u2069\u200e\u200f\u061c",
    "pa\u200bss\u2060wo\ufeffrd\u00ad",
    "tag\U000e0041\U000e007f",
    "line\u2028and\u2029paragraph",
    "half \ud83d pair",
    "\ufff9a\ufffab\ufffb\u2065\ufdd0\ue000",
    "\u3164\u115f\u034f",
]
KEPT = [
    "plain",
    "Grüße, ½ €",
    "中文 日本語 한국어",
    "שלום مرحبا",
    "می‌خواهم",
    "श्री क्‍ष",
    "👩‍👩‍👧 ❤️ 1️⃣ 🇩🇪 👍🏽",
    "e\u0301",
    "\u3000\u00a0 x",
    r"C:\x1b \frac",
]

SAFE = {"\n"}


def raw(text: str) -> list[str]:
    """What in a text steers a terminal or shows nothing."""
    return [
        letter
        for letter in text
        if letter not in SAFE
        and unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Zl", "Zp", "Co", "Cn")
    ]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_what_steers_a_terminal_is_shown(text):
    shown = visible(text)
    assert raw(shown) == []
    assert "\n" not in shown
    for letter in text:
        assert letter in shown or letter.encode("unicode_escape").decode() in shown


@pytest.mark.parametrize("text", KEPT)
def test_text_of_all_languages_stays(text):
    assert visible(text) == text


def test_joiners_and_selectors_hide_nothing():
    assert visible("pa\u200dypal \u200c") == r"pa\u200dypal \u200c"
    assert visible("a\ufe0f\ufe01\ufe02") == "a\ufe0f" + r"\ufe01\ufe02"
    assert visible("x\U000e0101") == r"x\U000e0101"


def test_a_long_text_is_cut_and_says_so():
    shown = visible("\x1b" * 3_000_000 + "end")
    assert len(shown) < 1.1 * terminal.LONGEST
    assert "3000003 characters" in shown
    assert shown.endswith("end")
    assert one_line("cause:\n  in\r\n\tdetail\n") == "cause: in detail"


def test_markup_is_text(capsys):
    answers(
        [
            (
                "[red]x[/red] :smile: [link=http://x]y[/link]",
                gap.Answered("1", "[bold]a", "[/]", "[blink]b", True, False),
            )
        ]
    )
    said = capsys.readouterr().out
    for text in ("[red]x[/red] :smile:", "[link=http://x]y[/link]", "[bold]a", "[/]", "[blink]b"):
        assert text in said


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_tables_steer_nothing(text, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    answers([(text, gap.Answered(text, text, text, text, None, None))])
    rows = [gap.Answered("1", "a", "a", "a", True, True)]
    measured(gap.accuracies(rows), text, text)
    summary = {
        "completions": 1,
        "completions_truncated": 0,
        "steps": 1,
        "seconds": 1.0,
        "device": text,
    }
    summary |= {"verdict": "unchanged", "rows_not_measured": 0}
    before_after(summary | {name: gap.accuracies(rows) for name in ("before", "after")}, Path(text))
    said = capsys.readouterr().out
    assert raw(said) == []
    assert not any(line.startswith("opd: done") for line in said.splitlines())


def test_the_console_looks_at_what_others_render(capsys):
    from rich.text import Text

    Terminal().print(Text("\x1b[2J\u202e"), "[red]x")
    assert capsys.readouterr().out == "\\x1b[2J\\u202e [red]x\n"


HOSTILE_ARGUMENTS = [
    ["gap", "--model", "{}"],
    ["gap", "--data", "{}"],
    ["gap", "{}"],
    ["{}"],
    ["gap", "--{}"],
    ["gap", "--count", "{}"],
    ["train", "--resume", "{}"],
    ["train", "--set", "{}"],
    ["train", "--set", "{}.x=1"],
    ["train", "--set", "run.{}=1"],
    ["train", "--set", "view.kind={}"],
    ["export", "{}", "--out", "out"],
    ["export", "run", "--out", "out", "--as", "{}"],
    ["backends", "{}"],
    ["plan", "--device", "{}"],
    ["plan", "--image", "{}"],
]


@pytest.mark.parametrize("arguments", HOSTILE_ARGUMENTS, ids=" ".join)
def test_errors_steer_nothing(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in [*HOSTILE, "x" * 3_000_000]:
        result = CliRunner().invoke(
            main, [argument.format(text.replace("\x00", "")) for argument in arguments]
        )
        assert result.exit_code == 2, result.stderr
        assert raw(result.stderr) == []
        assert result.stderr.count("\n") == 1
        assert len(result.stderr) < 2 * terminal.LONGEST
        assert (result.stdout, [*tmp_path.iterdir()]) == ("", [])


def test_arguments_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for option in ("--data", "--out", "--model", "--resume", "--set"):
        for text in ("a\udcff", "a\0b"):
            result = CliRunner().invoke(main, ["train", option, text])
            assert result.exit_code == 2
            assert result.stderr.count("\n") == 1
    assert "not UTF-8" in CliRunner().invoke(main, ["gap", "--data", "a\udcff"]).stderr
    assert "NUL" in CliRunner().invoke(main, ["gap", "--data", "a\0"]).stderr


@pytest.mark.parametrize("text", [*HOSTILE, *KEPT], ids=ascii)
def test_json_is_valid_and_parses_to_the_same(text, capsys):
    value = {text: [text, {"n": text}], "number": 1.5}
    terminal.say_json(value)
    said = capsys.readouterr().out
    assert raw(said) == []
    assert said.isascii()
    assert json.loads(said) == value
    stored = dumps(value)
    assert json.loads(stored) == value
    assert not {
        letter
        for letter in raw(stored)
        if letter not in "\u200c\u200d\ufff9\ufffa\ufffb\u00ad\ufdd0\ue000"
    }
    stored.encode()


def test_numbers_that_are_not_finite_are_null(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "")
    row = {
        "step": 1,
        "loss": math.nan,
        "rows": [math.inf, (-math.inf, 2.0)],
        "deep": {"x": [math.nan]},
        "on": True,
    }
    stored = {
        "step": 1,
        "loss": None,
        "rows": [None, [None, 2.0]],
        "deep": {"x": [None]},
        "on": True,
    }
    folder.append("metrics.jsonl", row)
    assert folder.rows("metrics.jsonl") == [stored]
    folder.rewrite("metrics.jsonl", [row, row])
    folder.write("summary.json", row)
    assert folder.read("summary.json") == stored
    for name in ("metrics.jsonl", "summary.json"):
        assert not re.search("NaN|Infinity", (tmp_path / "run" / name).read_text())


def test_halves_of_pairs_are_stored(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "")
    folder.append("rollouts.jsonl", {"text": "a\ud83db\n\u2028\x85ä"})
    assert folder.rows("rollouts.jsonl") == [{"text": "a\ud83db\n\u2028\x85ä"}]
    assert "ä" in (tmp_path / "run/rollouts.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["train", "--lr", "1e-5"], "--lr; did you mean --set optimizer.learning_rate=1e-5?"),
        (["train", "--lr=1e-5"], "--lr; did you mean --set optimizer.learning_rate=1e-5?"),
        (["train", "-lr", "1e-5"], "-lr; did you mean --set optimizer.learning_rate=1e-5?"),
        (
            ["train", "--learning-rate", "2"],
            "--learning-rate; did you mean --set optimizer.learning_rate=2?",
        ),
        (
            ["train", "--learning_rat", "2"],
            "--learning_rat; did you mean --set optimizer.learning_rate=2?",
        ),
        (
            ["train", "--optimizer.lr", "2"],
            "--optimizer.lr; did you mean --set optimizer.learning_rate=2?",
        ),
        (["train", "--batch-size", "8"], "--batch-size; did you mean --set rollout.prompts=8?"),
        (["train", "--epochs", "3"], "--epochs; a run is as long as its steps: --steps N"),
        (
            ["train", "--max-tokens", "9"],
            "did you mean --set rollout.max_tokens=9 or --set measure.max_tokens=9?",
        ),
        (["gap", "--max_new_tokens", "9"], "did you mean --set rollout.max_tokens=9"),
        (
            ["train", "--temperature"],
            "--temperature; did you mean --set rollout.temperature=VALUE?",
        ),
        (["train", "--lora-rank", "9"], "did you mean --set model.rank=9?"),
        (["train", "--max-steps", "9"], "did you mean --steps 9?"),
        (["gap", "--steps", "9"], "did you mean --set run.steps=9?"),
        (["train", "--output-dir", "x"], "did you mean --out x?"),
        (["train", "--dataset", "x"], "did you mean --data x?"),
        (["train", "--num-generations", "4"], "did you mean --set rollout.completions=4?"),
        (["train", "--beta", "0.5"], "did you mean --set objective.alpha=0.5?"),
        (["train", "--dtype", "bfloat16"], "did you mean --set model.dtype=bfloat16?"),
        (["train", "--bf16"], "did you mean --set model.dtype=bfloat16?"),
        (["train", "--gpu"], "did you mean --backend cuda?"),
        (["train", "--config", "a.toml"], "did you mean a.toml without an option's name?"),
        (["train", "--alpha", "1"], "did you mean --set model.alpha=1 or --set objective.alpha=1?"),
        (["export", "run", "--lr", "1"], "no such option --lr; known: --as, --backend, "),
        (["train", "--qqqqqqq"], "no such option --qqqqqqq (see: "),
    ],
)
def test_an_unknown_option_names_what_it_may_have_meant(arguments, meant):
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert meant in result.stderr
    assert result.stderr.count("\n") == 1


def test_every_key_and_every_name_of_elsewhere_is_known():
    keys = suggestions.keys()
    options = {
        option for parameter in main.get_command(None, "train").params for option in parameter.opts
    } | {"--count", "RECIPE"}
    for target in suggestions.ELSEWHERE:
        name, _, value = target.partition("=")
        assert name.partition(" ")[0] in options or name in keys[name.partition(".")[2]]
        if value:
            recipes.load("tiny", [target])
    names = [name for line in suggestions.ELSEWHERE.values() for name in line.split()]
    assert len(names) == len(set(names))
    assert not set(names) & set(keys)  # a key's own name comes first
    for key in keys:
        result = CliRunner().invoke(main, ["plan", f"--{key.replace('_', '-')}x"])
        assert "did you mean" in result.stderr or "Did you mean" in result.stderr


def test_libraries_say_one_line_each(capsys):
    with terminal.prepared():
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            warnings.warn("is old\n   \x1b[31mvery", FutureWarning, stacklevel=1)
        logging.getLogger("bitsandbytes.cextension").warning("no GPU\nat all")
        logging.getLogger("peft.tuners").warning("two\nlines \x1b]0;x\x07")
        logging.getLogger("opd_torch.model").warning("told")
        logging.getLogger("transformers").info("unheard")
        print("\r 10%\r 100%\nraw \x1b[2J", file=sys.stderr)
        print("unfinished", end="", file=sys.stderr)
    assert capsys.readouterr().err.splitlines() == [
        r"FutureWarning: is old \x1b[31mvery",
        r"peft: two lines \x1b]0;x\x07",
        "told",
        " 100%",
        r"raw \x1b[2J",
        "unfinished",
    ]


def test_a_fault_of_opd_keeps_its_traceback_and_asks_for_a_report(installed):
    installed(faulty=plugins.faulty)
    result = CliRunner().invoke(main, ["gap", "--backend", "faulty"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert r"ValueError: \x1b[2J\u202ehidden" in result.stderr
    assert raw(result.stderr) == []
    assert result.stderr.splitlines()[-1] == (
        "opd: this is a fault of opd, not of your input; please report it with the lines above"
        " (ValueError)"
    )


def test_little_memory_is_one_line(installed):
    installed(full=plugins.full)
    result = CliRunner().invoke(main, ["gap", "--backend", "full"])
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("opd: not enough memory")
    assert "Traceback" not in result.stderr


class Full(io.StringIO):
    """A console whose writes fail."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            OSError(28, "No space left on device"),
            1,
            "opd: stdout cannot be written: No space left on device\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
    ],
)
@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_a_stdout_that_takes_nothing(error, code, said, arguments, capsys):
    with redirect_stdout(Full(error)), pytest.raises(SystemExit) as stop:
        main(arguments, prog_name="opd")
    assert (stop.value.code, capsys.readouterr().err) == (code, said)


def test_a_stderr_that_takes_nothing_ends_no_command(capsys):
    with redirect_stderr(Full(OSError(5, "Input/output error"))):
        main(["plan", "tiny", "--device", "H200", "--json"], prog_name="opd")
        assert json.loads(capsys.readouterr().out)
        with pytest.raises(SystemExit) as stop:
            main(["trian"], prog_name="opd")
    assert stop.value.code == 2


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_console_without_the_characters(encoding):
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    with redirect_stdout(written), terminal.prepared():
        answers([("日本 – Grüße", gap.Answered("1", "ä日", "中", "х", True, False))])
        terminal.say_json({"x": "日本"})
    written.flush()
    said = written.buffer.getvalue().decode(encoding)
    assert r"\u65e5\u672c" in said
    assert r"\u4e2d" in said
    assert ("Gr\\xfc" in said) == (encoding == "ascii")


@pytest.mark.parametrize("columns", ["0", "1", "20", "40", "500", "x"])
def test_any_width(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    answers([("question " * 9, gap.Answered("1", "answer", "full", "crop", True, False))])
    said = "".join(capsys.readouterr().out.split())
    assert said.count("question") == 10
    assert "answer" in said


def test_closed_streams_and_a_reader_that_goes(tmp_path):
    """The interpreter itself has nothing to complain of at its end."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "cli"))),
    }
    opd = f"{sys.executable} -m opd_cli"
    script = f"""
        {opd} --version >&- 2>a; echo $?
        {opd} trian 2>&- >b; echo $?
        {opd} trian <&- >&- 2>&-; echo $?
        {{ {opd} train --help 2>c; echo $? >d; }} | true; cat d
        {opd} train --help >/dev/full 2>e; echo $?
    """
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split()[:3] == ["0", "2", "2"]
    assert done.stdout.split()[3] in ("0", "141")  # written before the reader went, or after
    assert done.stdout.split()[4] == "1"
    assert done.stderr == ""
    assert [(tmp_path / name).read_text() for name in "abc"] == ["", "", ""]
    full = "opd: stdout cannot be written: No space left on device\n"
    assert (tmp_path / "e").read_text() == full


def test_help_is_plain():
    """So that click's own writing needs no escapes."""
    commands = [[], *([name] for name in opd_cli.COMMANDS)]
    commands += [["data", name] for name in opd_cli.data.COMMANDS]
    for command in commands:
        said = CliRunner().invoke(main, [*command, "--help"]).stdout
        assert said.isascii()
        assert said
    assert issubclass(click.NoSuchOption, click.UsageError)
