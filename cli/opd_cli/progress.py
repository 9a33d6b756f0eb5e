"""Progress of a run on stderr: live bars in a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

from rich.cells import cell_len
from rich.console import Group
from rich.live import Live
from rich.text import Text

from opd_cli import signals
from opd_cli.console import Terminal
from opd_cli.terminal import Stderr, one_line

WIDE = 100
"""Columns from which numbers stand with more digits; the usual 80 take a shorter form."""

PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""

REMEMBERED = 20
"""Last reports of a phase from which its rate is taken: steps differ, and the first one compiles."""

TITLES = {"before": "measure before", "after": "measure after"}
UNITS = {"train": "step", "read": "row"}

BAR = 24


@dataclass
class Phase:
    """How far a phase is, and how fast."""

    title: str
    unit: str
    total: int
    done: int
    detail: tuple[str, ...] = ()
    reports: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=REMEMBERED))

    def begin(self, total: int, done: int) -> None:
        """Begins, or goes on after something else."""
        self.total, self.done = total, done
        self.reports.clear()
        self.reports.append((time.monotonic(), done))

    def advance(self, units: int) -> None:
        """So many more are done."""
        self.done += units
        self.reports.append((time.monotonic(), self.done))

    @property
    def seconds(self) -> float | None:
        """Seconds a unit lately; None before the first one is done."""
        (began, first), (ended, last) = self.reports[0], self.reports[-1]
        return max(1e-9, ended - began) / (last - first) if last > first else None

    def left(self) -> str:
        """The time that is left, less what went by since the last report; empty where nobody can know."""
        if self.seconds is None or self.done >= self.total:
            return ""
        return f"{duration(max(0.0, (self.total - self.done) * self.seconds - (time.monotonic() - self.reports[-1][0])))} left"

    def rate(self) -> str:
        """Units in a second, or the time of one where it takes longer."""
        return rate(self.seconds, self.unit) if self.seconds is not None else ""


def duration(seconds: float) -> str:
    """A time as people say it: 45 s, 12 min 05 s, 1 h 05 min, 2 d 03 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24:02} h"


def rate(seconds: float, unit: str) -> str:
    """The pace at so many seconds a unit: 78 steps/s, 1.4 steps/s, 2.5 s/step, 2.3 min/step, 1.2 h/step."""
    if seconds <= 1:
        return f"{1 / seconds:.{0 if seconds <= 0.1 else 1}f} {unit}s/s"
    size, name = next((size, name) for size, name in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= 2 * size)
    value = seconds / (size or 1)
    return f"{value:.{0 if value >= 100 else 1}f} {name}/{unit}"


class Shown:
    """What `opd.progress.Progress` asks for, on stderr."""

    def __init__(self, stderr: Stderr) -> None:
        self.stopping = False
        self._stderr = stderr
        self._console = Terminal(file=cast("TextIO", _Raw(stderr)))
        self._live = stderr.isatty() and not self._console.is_dumb_terminal
        self._wide = not self._live or self._console.width >= WIDE
        self._phases: dict[str, Phase] = {}
        self._now = ""
        self._spoke = 0.0
        self._bars = Live(
            console=self._console,
            get_renderable=self._lines,
            redirect_stdout=False,
            redirect_stderr=False,
            refresh_per_second=4,
        )

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """A bar, new or going on, or a plain line."""
        self._now = phase
        shown = self._phases.setdefault(phase, Phase(TITLES.get(phase, phase), UNITS.get(phase, "answer"), total, done))
        shown.begin(total, done)
        self._spoke = time.monotonic()
        if not self._live and not done and phase != "read":  # mostly over at once
            self.note(f"{shown.title}: {total} {shown.unit}{'s' if total != 1 else ''}")

    def advance(self, units: int) -> None:
        """Moves the bar; speaks from time to time when piped."""
        phase = self._phases[self._now]
        phase.advance(units)
        over = phase.done >= phase.total and self._now != "read"
        if not self._live and (time.monotonic() - self._spoke > PLAIN_SECONDS or over):
            self._spoke = time.monotonic()
            parts = f"{phase.title}: {phase.done}/{phase.total}", phase.rate(), phase.left(), *phase.detail
            self.note("  ".join(part for part in parts if part))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Takes the numbers that stand beside the bar."""
        digits, unit = (4, "tokens/s") if self._wide else (3, "tok/s")
        loss, divergence = (f"{name} {metrics[name]:.{digits}f}" for name in ("loss", "divergence"))
        self._phases["train"].detail = loss, divergence, f"{metrics['tokens_per_second']:.0f} {unit}"

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(one_line(message), soft_wrap=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Takes the bars off the screen while the block runs, and lets other programs draw theirs."""
        self._bars.transient = True  # else they stayed, and came a second time
        self.close()
        self._stderr.bars = True
        try:
            yield
        finally:
            self._stderr.bars = False
            self._bars.transient = False
            self.open()

    def open(self) -> None:
        """Begins to draw."""
        if self._live:
            self._bars.start(refresh=False)

    def close(self) -> None:
        """Draws no more."""
        if self._live:
            self._bars.stop()

    def stop(self) -> None:
        """Asks the run to stop after this step; a second time, or where no step is under way, stops it now."""
        if self.stopping or self._now not in ("train", "measure"):
            raise KeyboardInterrupt
        self.stopping = True
        self.note("stopping after this step; once more stops at once")

    def _lines(self) -> Group:
        """A line for each phase, and as much in it as has room."""
        counts = {key: f"{phase.done}/{phase.total}" for key, phase in self._phases.items()}
        widest = max(map(len, counts.values()), default=0)
        return Group(*(self._line(phase, counts[key].rjust(widest)) for key, phase in self._phases.items()))

    def _line(self, phase: Phase, count: str) -> Text:
        room = self._console.width - 1
        parts = [part for part in (phase.left(), phase.rate(), *phase.detail) if part]
        title = max(len(shown.title) for shown in self._phases.values())
        while parts and cell_len("  ".join((phase.title.ljust(title), count, *parts))) > room:
            parts.pop()
        text = "  ".join((phase.title.ljust(title), count, *parts))
        bar = min(BAR, room - cell_len(text) - 2)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(phase.title.ljust(title))
        if bar >= 6:
            full, empty = ("#", "-") if self._console.options.ascii_only else ("━", "━")
            filled = bar if phase.done >= phase.total else bar * phase.done // phase.total
            line.append("  ").append(full * filled, style="green").append(empty * (bar - filled), style="bright_black")
        line.append("  ").append("  ".join((count, *parts)))
        return line


class _Raw:
    """The console's own writes to stderr, which are visible already."""

    def __init__(self, stderr: Stderr) -> None:
        self._stderr = stderr
        self.encoding = stderr.encoding

    def write(self, text: str) -> int:
        self._stderr.raw(text)
        return len(text)

    def flush(self) -> None:
        self._stderr.flush()

    def isatty(self) -> bool:
        return self._stderr.isatty()

    def fileno(self) -> int:
        return self._stderr.fileno()


@contextmanager
def show() -> Iterator[Shown]:
    """Shows progress while the block runs; Ctrl-C, SIGTERM and SIGHUP ask it to stop."""
    stderr = sys.stderr if isinstance(sys.stderr, Stderr) else Stderr(sys.stderr)
    shown, before = Shown(stderr), stderr.note
    stderr.note = shown.note
    try:
        with signals.asking(shown.stop):
            shown.open()
            try:
                yield shown
            finally:
                shown.close()
    finally:
        stderr.note = before
