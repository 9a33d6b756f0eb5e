"""Shows the progress of a run on stderr: live bars in a terminal, plain lines when piped."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO, TypeAlias, cast

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
"""From this many columns on, bars and numbers are longer; 80 columns take a shorter form."""

PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""

REMEMBERED = 20
"""The rate of a phase is an average over this many reports, since steps differ, and the first step
may compile."""

MOMENT = 0.02
"""Shortest time in seconds from which a rate is computed."""

TITLES = {"before": "measure before", "after": "measure after"}
ROWS = ("read", "check", "against", "convert", "show", "locate")
"""Phases that count rows."""

UNITS = {"train": "step", **dict.fromkeys(ROWS, "row")}

SHORT = {"measure before": "before", "measure after": "after"}
"""Titles on a narrow console."""


Clock: TypeAlias = Callable[[], float]
"""Seconds since some fixed time."""


@dataclass
class Phase:
    """Progress and speed of one phase. `detail`: numbers of the last step, as text. `reports`:
    (time, units done) of the last reports, in seconds of the `clock`."""

    title: str
    unit: str
    total: int
    done: int
    clock: Clock
    detail: tuple[str, ...] = ()
    reports: deque[tuple[float, int]] = field(default_factory=deque)

    def begin(self, total: int, done: int) -> None:
        """Begins the phase, or continues it after another phase."""
        self.total, self.done = total, done
        # One assignment, since another thread reads the reports.
        self.reports = deque([(self.clock(), done)], REMEMBERED)

    def advance(self, units: int) -> None:
        """Adds `units` to those that are done."""
        self.done += units
        self.reports.append((self.clock(), self.done))

    @property
    def seconds(self) -> float | None:
        """Recent seconds per unit; None if it is too early to tell."""
        (began, first), (ended, last) = self.reports[0], self.reports[-1]
        if last <= first or ended - began <= MOMENT:
            return None
        return (ended - began) / (last - first)

    def count(self) -> str:
        """Units done and total, such as 3/50."""
        return f"{self.done}/{self.total}"

    def left(self) -> str:
        """The estimated time left; empty if it is too early to tell."""
        if self.seconds is None or self.done >= self.total:
            return ""
        since = self.clock() - self.reports[-1][0]
        return f"{duration(max(0.0, (self.total - self.done) * self.seconds - since))} left"

    def rate(self) -> str:
        """The recent rate in words; empty if it is too early to tell."""
        return rate(self.seconds, self.unit) if self.seconds is not None else ""


def duration(seconds: float) -> str:
    """A time in words: 45 s, 12 min 05 s, 1 h 05 min, 2 d 03 h."""
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
    """The rate of `seconds` per unit, in words: 78 steps/s, 1.4 steps/s, 2.5 s/step, 2.3 min/step,
    1.2 h/step."""
    if seconds <= 1:
        return f"{1 / seconds:.{0 if seconds <= 0.1 else 1}f} {unit}s/s"
    size, name = next(
        (size, name) for size, name in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= 2 * size
    )
    value = seconds / (size or 1)
    return f"{value:.{0 if value >= 100 else 1}f} {name}/{unit}"


def digits_of(number: float) -> str:
    """A number above 0 with two digits, or all digits before the point: 1234, 78, 7.8, 0.0078."""
    return f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"


class ProgressBars:
    """Shows progress on stderr; implements `opd.progress.Progress`."""

    def __init__(self, stderr: Stderr, clock: Clock = time.monotonic) -> None:
        self.stopping = False
        self._stderr = stderr
        self._clock = clock
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
        """Adds or resets the bar of a phase; piped, writes a plain line."""
        self._now = phase
        shown = self._phases.get(phase) or Phase(
            TITLES.get(phase, phase), UNITS.get(phase, "answer"), total, done, self._clock
        )
        shown.begin(total, done)
        self._phases[phase] = shown
        self._spoke = self._clock()
        if not self._live and not done and phase != "read":  # reading is usually short
            self.note(f"{shown.title}: {plural(total, shown.unit)}")

    def advance(self, units: int) -> None:
        """Moves the bar; piped, writes a line every PLAIN_SECONDS."""
        phase = self._phases[self._now]
        phase.advance(units)
        over = units and phase.done >= phase.total and self._now != "read"
        if not self._live and (self._clock() - self._spoke > PLAIN_SECONDS or over):
            self._spoke = self._clock()
            parts = (
                f"{phase.title}: {phase.done}/{phase.total}",
                phase.rate(),
                phase.left(),
                *phase.detail,
            )
            self.note("  ".join(part for part in parts if part))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Sets the numbers beside the bar."""
        digits, unit = (4, "tokens/s") if self._wide else (3, "tok/s")
        loss, divergence = (f"{name} {metrics[name]:.{digits}f}" for name in ("loss", "divergence"))
        speed = f"{digits_of(metrics['tokens_per_second'])} {unit}"
        self._phases["train"].detail = (
            (loss, divergence, speed) if self._wide else (loss, speed, divergence)
        )

    def note(self, message: str) -> None:
        """Writes a line above the bars."""
        with self._console:  # as one write
            if self._live:
                self._reflow()
            self._console.print(one_line(message), soft_wrap=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Removes the bars from the screen while the block runs, so that a library can draw
        progress bars."""
        self._bars.transient = True  # otherwise the bars would stay, and appear twice later
        self.close()
        self._stderr.bars = True
        try:
            yield
        finally:
            self._stderr.bars = False
            self._bars.transient = False
            self.open()

    def open(self) -> None:
        """Begins to draw the bars."""
        if self._live:
            self._bars.start(refresh=False)

    def close(self) -> None:
        """Stops drawing the bars."""
        if self._live:
            self._bars.stop()
            self._drawn = []

    def stop(self) -> None:
        """Asks the run to stop after the current step. Raises KeyboardInterrupt if called a second
        time, or while no step is running."""
        if self.stopping or self._now not in ("train", "measure"):
            raise KeyboardInterrupt
        self.stopping = True
        self.note("stopping after this step; once more stops at once")

    def _lines(self) -> Group:
        """The bars: a line for each phase."""
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
        """Erases the extra lines that appear when a narrower window wraps the drawn bars."""
        extra = sum(max(0, columns - 1) // max(1, self._console.width) for columns in self._drawn)
        self._drawn = []
        line_up = (
            ControlType.CARRIAGE_RETURN,
            (ControlType.ERASE_IN_LINE, 2),
            (ControlType.CURSOR_UP, 1),
        )
        self._console.control(Control(*(line_up * extra)))

    def _line(self, title: str, count: str, phase: Phase, wide: bool) -> Text:
        """The line of a phase: title and count, and as much as fits of bar, time left, rate and the
        numbers of the last step."""
        columns = self._console.width - 1 - cell_len(title) - 2 - cell_len(count)
        line = Text(title, no_wrap=True, overflow="ellipsis")
        bar = 24 if wide else 8 if columns >= 40 else 0
        if bar:
            columns -= bar + 2
            full, empty = ("#", "-") if self._console.options.ascii_only else ("\u2501", "\u2501")
            filled = bar if phase.done >= phase.total else bar * phase.done // phase.total
            line.append("  ").append(full * filled, style="green").append(
                empty * (bar - filled), style="bright_black"
            )
        line.append("  ").append(count)
        for part in (phase.left(), phase.rate(), *phase.detail):
            if part and cell_len(part) + 2 <= columns:
                columns -= cell_len(part) + 2
                line.append("  ").append(part)
        return line


class _Raw:
    """Passes the console's output to stderr without escaping it a second time."""

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
def show(clock: Clock = time.monotonic) -> Iterator[ProgressBars]:
    """Shows progress while the block runs; Ctrl-C, SIGTERM and SIGHUP call `ProgressBars.stop`."""
    stderr = sys.stderr if isinstance(sys.stderr, Stderr) else Stderr(sys.stderr)
    bars, before = ProgressBars(stderr, clock), stderr.note
    stderr.note = bars.note
    try:
        with signals.asking(bars.stop):
            bars.open()
            try:
                yield bars
            finally:
                bars.close()
    finally:
        stderr.note = before
