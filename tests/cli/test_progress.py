"""Bars that stand once on the screen, rates and times in fitting units, and runs that are asked to
stop."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, redirect_stderr
from pathlib import Path

import pytest
from click.testing import CliRunner

from opd_cli import main, progress, signals
from opd_cli.progress import digits_of, duration, rate
from opd_cli.terminal import Stderr
from tests.support import plugins

ROOT = Path(__file__).parents[2]
METRICS = {
    "step": 1,
    "loss": 0.123456,
    "divergence": 0.1234,
    "tokens_per_second": 1234.5,
    "taken": True,
}


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (3900, "1 h 05 min"),
        (86390, "1 d 00 h"),
        (97200, "1 d 03 h"),
        (1e7, "115 d 18 h"),
    ],
)
def test_times_have_fitting_units(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("number", "said"),
    [(1234.5, "1234"), (9.97, "10"), (9.94, "9.9"), (0.4, "0.4"), (0.0321, "0.032")],
)
def test_a_slow_machine_draws_more_than_0_tokens_a_second(number, said):
    assert digits_of(number) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1 / 789, "789 steps/s"),
        (0.1, "10 steps/s"),
        (0.7, "1.4 steps/s"),
        (1.0, "1.0 steps/s"),
        (2.5, "2.5 s/step"),
        (95, "95.0 s/step"),
        (138, "2.3 min/step"),
        (5400, "90.0 min/step"),
        (7920, "2.2 h/step"),
        (1e6, "278 h/step"),
    ],
)
def test_rates_have_fitting_units(seconds, said):
    assert rate(seconds, "step") == said


class Screen(io.StringIO):
    """A terminal that keeps what stands on it: rows, and where the cursor is."""

    encoding = "utf-8"

    def __init__(self, live=True):
        super().__init__()
        self.rows, self.row, self.live, self.raw = [""], 0, live, ""

    def isatty(self):
        return self.live

    def fileno(self):
        raise OSError

    def write(self, text):
        self.raw += text
        for part in re.findall(r"\x1b\[\??[\d;]*[A-Za-z]|[\r\n]|[^\r\n\x1b]+", text):
            if part == "\n":
                self.row += 1
                self.rows += [""] * (self.row + 1 - len(self.rows))
            elif part == "\x1b[1A":
                self.row -= 1
            elif part == "\x1b[2K":
                self.rows[self.row] = ""
            elif part[0] not in "\r\x1b":
                self.rows[self.row] += part
        return len(text)


@pytest.fixture
def screen(monkeypatch):
    with ExitStack() as redirected:

        def make(columns=80, live=True, term="xterm"):
            monkeypatch.delenv("COLUMNS", raising=False)
            if columns:
                monkeypatch.setenv("COLUMNS", str(columns))
            monkeypatch.setenv("TERM", term)
            shown = Screen(live)
            redirected.enter_context(redirect_stderr(Stderr(shown)))
            return shown

        yield make


class Clock:
    """Seconds that pass when they are told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def run(wait, clock=time.monotonic):
    """The phases of a run, with notes, other programs' bars, and a measurement between steps."""
    with progress.show(clock) as shown:
        shown.begin("read", 6)
        wait()
        shown.advance(6)
        with shown.pause():
            print("their bar\r", end="", file=sys.stderr)
        shown.note("a note")
        with shown.pause():
            pass
        shown.begin("before", 4)
        shown.advance(4)
        shown.begin("train", 65)
        for step in range(1, 4):
            wait()
            shown.step(METRICS | {"step": step})
            shown.advance(1)
            if step == 2:
                shown.begin("measure", 4)
                shown.advance(4)
                print("a library's line", file=sys.stderr)
                shown.begin("train", 65, step)


@pytest.mark.parametrize("columns", [120, 80, 40, 20, 1])
def test_each_bar_stands_once(screen, columns):
    shown = screen(columns)
    run(lambda: time.sleep(0.03))
    for count in ("3/65", " 6/6"):
        assert sum(count in row for row in shown.rows) == (1 if columns > 1 else 0)
    assert [row for row in shown.rows if "note" in row] == ["a note"]
    assert "a library's line" in shown.rows
    bars = shown.rows[shown.rows.index("a library's line") + 1 :]
    assert len([row for row in bars if row]) == 4
    assert all(len(row) <= columns for row in bars)
    if columns == 120:
        assert re.search(
            r"━{24} +3/65  \d+ s left  \d+\.?\d* steps/s  loss 0.1235  divergence 0.1234  1234"
            r" tokens/s$",
            bars[2],
        )
    if columns == 80:
        assert re.search(
            r"━{8} +3/65  \d+ s left  \d+\.?\d* steps/s  loss 0.123  1234 tok/s$", bars[2]
        )


def test_a_bar_stands_once_where_the_run_is_interrupted(screen):
    shown = screen()

    def interrupted():
        with progress.show() as bars:
            bars.begin("before", 10)
            bars.advance(5)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sum("5/10" in row for row in shown.rows) == 1


def test_a_narrower_window_leaves_no_second_bar(screen, monkeypatch):
    shown = screen(columns=None)  # as wide as the console is
    with progress.show() as bars:
        bars.begin("train", 10)
        bars.step(METRICS)
        bars.advance(2)
        for _ in range(1000):  # bars are drawn four times a second
            if any("2/10" in text for text in shown.rows):
                break
            time.sleep(0.01)
        (row,) = (place for place, text in enumerate(shown.rows) if "2/10" in text)
        line = shown.rows[row]
        width = 30
        broken = [line[start : start + width] for start in range(0, len(line), width)]
        shown.rows[row:] = broken  # as terminals do
        shown.row = len(shown.rows) - 1
        monkeypatch.setenv("COLUMNS", str(width))
        bars.note("a note")
        bars.advance(1)
    assert not any("2/10" in text or "divergence" in text for text in shown.rows)
    assert [text for text in shown.rows if "note" in text] == ["a note"]
    assert sum("3/10" in text for text in shown.rows) == 1


@pytest.mark.parametrize("force", ["", "1"])
@pytest.mark.parametrize(("live", "term"), [(False, "xterm"), (True, "dumb")])
def test_plain_lines_where_nothing_can_be_drawn(screen, monkeypatch, live, term, force):
    if force:
        monkeypatch.setenv("FORCE_COLOR", force)
    shown, clock = screen(20, live, term), Clock()
    run(lambda: clock.wait(1.1 * progress.PLAIN_SECONDS), clock)
    assert "\x1b" not in shown.raw
    lines = shown.raw.replace("their bar\r", "").splitlines()
    read, *others = lines[:4]
    assert read == "read: 6/6  1.8 s/row"
    assert others == ["a note", "measure before: 4 answers", "measure before: 4/4"]
    numbers = "loss 0.1235  divergence 0.1234  1234 tokens/s"
    assert lines[5] == f"train: 1/65  11.0 s/step  11 min 44 s left  {numbers}"


def test_a_slow_step_is_told_in_minutes(screen):
    shown, clock = screen(80, live=False), Clock()
    with progress.show(clock) as bars:
        bars.begin("train", 65, 5)
        for _ in range(3):
            clock.wait(140)
            bars.advance(1)
    assert shown.raw.splitlines()[-1] == "train: 8/65  2.3 min/step  2 h 13 min left"


def test_the_end_of_a_phase_is_told_once(screen):
    shown = screen(80, live=False)
    with progress.show() as bars:
        bars.begin("before", 2)
        bars.advance(2)
        bars.advance(0)
    assert shown.raw.splitlines() == ["measure before: 2 answers", "measure before: 2/2"]


def test_hours_stand_in_the_bar(screen):
    shown, clock = screen(80), Clock()
    with progress.show(clock) as bars:
        bars.begin("train", 65)
        clock.wait(140)
        bars.step(METRICS)
        bars.advance(1)
        clock.wait(60)  # the next step is under way
    assert "1/65  2 h 28 min left  2.3 min/step" in shown.rows[-2]


def test_signals_ask_and_then_stop():
    asked = []
    with signals.handled() as heard, signals.asking(lambda: asked.append(heard.received)):
        for name in ("SIGINT", "SIGINT", "SIGTERM", "SIGTERM", "SIGHUP", "SIGHUP"):
            os.kill(os.getpid(), getattr(signal, name))
        assert asked == [2, 2, 15, 1]  # `timeout` sends SIGTERM twice, a closing terminal SIGHUP
        time.sleep(1.1 * signals.TOGETHER)
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked[-1] == 15
        assert heard.exit_code == 143
        os.kill(os.getpid(), signal.SIGHUP)
        assert len(asked) == 5
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_under_nohup_goes_on():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handled(), signals.asking(pytest.fail):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_any_command(monkeypatch, installed, name, code):
    installed(interrupted=plugins.interrupted)
    monkeypatch.setenv("SIGNAL", name)
    result = CliRunner().invoke(main, ["gap", "--backend", "interrupted"])
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.splitlines()[-1] == "opd: interrupted"


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_a_run_that_goes_on(tmp_path):
    options = [
        "rollout.prompts=2",
        "rollout.completions=2",
        "rollout.max_tokens=4",
        "measure.count=0",
        "run.rollouts_every=0",
    ]
    arguments = ["train", "--backend", "cpu", "--steps", "25", "--out", "run"]
    arguments += [part for option in options for part in ("--set", option)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "backends", ROOT / "cli"))),
        "OMP_NUM_THREADS": "1",
    }
    run = subprocess.Popen(
        [sys.executable, "-m", "opd_cli", *arguments],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "run/metrics.jsonl"
    while run.poll() is None and not (metrics.is_file() and metrics.read_text().count("\n") > 1):
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 143, said
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert said.splitlines()[-2:] == [
        "stopping after this step; once more stops at once",
        f"opd: stopped after step {step}; go on with: opd train --resume run",
    ]
    assert len(metrics.read_text().splitlines()) == step < 25
    done = CliRunner().invoke(main, ["train", "--resume", str(tmp_path / "run")])
    assert done.exit_code == 0, done.stderr
    assert len(metrics.read_text().splitlines()) == 25
