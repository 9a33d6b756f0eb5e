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
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from opd.errors import plural
from opd_cli import signals
from opd_cli.console import Terminal
from opd_cli.terminal import Stderr, one_line

WIDE = 100
"""Columns from which numbers stand with more digits; the usual 80 take a shorter form."""

PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""

REMEMBERED = 20
"""Last reports of a phase from which its rate is taken: steps differ, and the first one
compiles."""

MOMENT = 0.02
"""Seconds that are too short to tell a rate."""

TITLES = {"before": "measure before", "after": "measure after"}
UNITS = {"train": "step", "read": "row"}

SHORT = {"measure before": "before", "measure after": "after"}
"""Titles where room is short."""


@dataclass
class Phase:
    """How far a phase is, and how fast."""

    title: str
    unit: str
    total: int
    done: int
    detail: tuple[str, ...] = ()
    reports: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self, total: int, done: int) -> None:
        """Begins, or goes on after something else."""
        self.total, self.done = total, done
        # at once: another thread draws
        self.reports = deque([(time.monotonic(), done)], REMEMBERED)

    def advance(self, units: int) -> None:
        """So many more are done."""
        self.done += units
        self.reports.append((time.monotonic(), self.done))

    @property
    def seconds(self) -> float | None:
        """Seconds a unit lately; None where nobody can know yet."""
        (began, first), (ended, last) = self.reports[0], self.reports[-1]
        return (ended - began) / (last - first) if last > first and ended - began > MOMENT else None

    def count(self) -> str:
        """Units that are done, of all."""
        return f"{self.done}/{self.total}"

    def left(self) -> str:
        """The time that is left, less what went by since the last report; empty where nobody can
        know."""
        if self.seconds is None or self.done >= self.total:
            return ""
        since = time.monotonic() - self.reports[-1][0]
        return f"{duration(max(0.0, (self.total - self.done) * self.seconds - since))} left"

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
    """The pace at so many seconds a unit: 78 steps/s, 1.4 steps/s, 2.5 s/step, 2.3 min/step, 1.2
    h/step."""
    if seconds <= 1:
        return f"{1 / seconds:.{0 if seconds <= 0.1 else 1}f} {unit}s/s"
    size, name = next(
        (size, name) for size, name in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= 2 * size
    )
    value = seconds / (size or 1)
    return f"{value:.{0 if value >= 100 else 1}f} {name}/{unit}"


def digits_of(number: float) -> str:
    """A number above 0 as it is read: 1234, 78, 7.8, 0.78, 0.0078; never 0 for a small one."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"


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
        self._drawn: list[int] = []  # columns of each line on the screen
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
        shown = self._phases.get(phase) or Phase(
            TITLES.get(phase, phase), UNITS.get(phase, "answer"), total, done
        )
        shown.begin(total, done)
        self._phases[phase] = shown
        self._spoke = time.monotonic()
        if not self._live and not done and phase != "read":  # mostly over at once
            self.note(f"{shown.title}: {plural(total, shown.unit)}")

    def advance(self, units: int) -> None:
        """Moves the bar; speaks from time to time when piped."""
        phase = self._phases[self._now]
        phase.advance(units)
        over = units and phase.done >= phase.total and self._now != "read"
        if not self._live and (time.monotonic() - self._spoke > PLAIN_SECONDS or over):
            self._spoke = time.monotonic()
            parts = (
                f"{phase.title}: {phase.done}/{phase.total}",
                phase.rate(),
                phase.left(),
                *phase.detail,
            )
            self.note("  ".join(part for part in parts if part))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Takes the numbers that stand beside the bar."""
        digits, unit = (4, "tokens/s") if self._wide else (3, "tok/s")
        loss, divergence = (f"{name} {metrics[name]:.{digits}f}" for name in ("loss", "divergence"))
        speed = f"{digits_of(metrics['tokens_per_second'])} {unit}"
        self._phases["train"].detail = (
            (loss, divergence, speed) if self._wide else (loss, speed, divergence)
        )

    def note(self, message: str) -> None:
        """A line above the bar."""
        with self._console:  # one write
            if self._live:
                self._reflow()
            self._console.print(one_line(message), soft_wrap=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Takes the bars off the screen while the block runs, and lets other programs draw
        theirs."""
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
            self._drawn = []

    def stop(self) -> None:
        """Asks the run to stop after this step; a second time, or where no step is under way, stops
        it now."""
        if self.stopping or self._now not in ("train", "measure"):
            raise KeyboardInterrupt
        self.stopping = True
        self.note("stopping after this step; once more stops at once")

    def _lines(self) -> Group:
        """A line for each phase."""
        self._reflow()
        wide = self._console.width >= WIDE
        phases = [
            (phase.title if wide else SHORT.get(phase.title, phase.title), phase)
            for phase in [*self._phases.values()]
        ]
        titles = max((len(title) for title, _ in phases), default=0)
        counts = max((len(phase.count()) for _, phase in phases), default=0)
        lines = [
            self._line(title.ljust(titles), phase.count().rjust(counts), phase, wide)
            for title, phase in phases
        ]
        self._drawn = [min(line.cell_len, self._console.width) for line in lines]
        return Group(*lines)

    def _reflow(self) -> None:
        """Goes to where the bars end, had nobody made the window narrower: the terminal has broken
        their lines since."""
        broken = sum(max(0, columns - 1) // max(1, self._console.width) for columns in self._drawn)
        self._drawn = []
        self._console.control(
            Control(
                *(
                    (
                        ControlType.CARRIAGE_RETURN,
                        (ControlType.ERASE_IN_LINE, 2),
                        (ControlType.CURSOR_UP, 1),
                    )
                    * broken
                )
            )
        )

    def _line(self, title: str, count: str, phase: Phase, wide: bool) -> Text:
        """The count, and as much else as has room: a bar, the time left, the rate, a step's
        numbers."""
        room = self._console.width - 1 - cell_len(title) - 2 - cell_len(count)
        line = Text(title, no_wrap=True, overflow="ellipsis")
        bar = 24 if wide else 8 if room >= 40 else 0
        if bar:
            room -= bar + 2
            full, empty = ("#", "-") if self._console.options.ascii_only else ("\u2501", "\u2501")
            filled = bar if phase.done >= phase.total else bar * phase.done // phase.total
            line.append("  ").append(full * filled, style="green").append(
                empty * (bar - filled), style="bright_black"
            )
        line.append("  ").append(count)
        for part in (phase.left(), phase.rate(), *phase.detail):
            if part and cell_len(part) + 2 <= room:
                room -= cell_len(part) + 2
                line.append("  ").append(part)
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
