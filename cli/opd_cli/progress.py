"""Progress of a run on stderr: a live bar in a terminal, plain lines when piped."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

WIDE = 100
"""Columns from which everything stands in full; the usual 80 take a shorter form."""

PLAIN_SECONDS = 10.0
"""Seconds between plain lines."""

TITLES = {"before": "measure before", "after": "measure after"}
UNITS = {"train": "steps", "read": "rows"}


class Shown:
    """What `opd.loop.Progress` asks for, on a rich console."""

    def __init__(self, console: Console) -> None:
        self.stopping = False
        self._console = console
        self._live = console.is_terminal
        self._wide = not self._live or console.width >= WIDE
        self._bars = Bars(
            TextColumn("{task.description:14}"),
            BarColumn(bar_width=24 if self._wide else 6),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[detail]}"),
            console=console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._phase, self._total, self._done, self._detail = "", 0, 0, ""
        self._resumed, self._started, self._spoke = 0, 0.0, 0.0

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """A bar, new or going on, or a plain line."""
        self._phase, self._total, self._done, self._detail = TITLES.get(phase, phase), total, done, ""
        self._resumed, self._started, self._spoke = done, time.monotonic(), time.monotonic()
        if phase not in self._tasks:
            self._tasks[phase] = self._bars.add_task(self._phase, total=total, completed=done, detail="")
        elif not done:
            self._bars.reset(self._tasks[phase], total=total, detail="")
        self._task = self._tasks[phase]
        if not self._live and not done and phase != "read":  # mostly over at once
            self._console.print(f"{self._phase}: {total} {UNITS.get(phase, 'answers')}", highlight=False)

    def advance(self, units: int) -> None:
        """Moves the bar; speaks from time to time when piped."""
        self._done += units
        self._bars.update(self._task, completed=self._done, detail=self._detail)
        over = self._done >= self._total and self._phase != "read"
        if not self._live and (time.monotonic() - self._spoke > PLAIN_SECONDS or over):
            self._spoke = time.monotonic()
            rate = (self._done - self._resumed) / max(1e-9, self._spoke - self._started)
            left = (self._total - self._done) / max(1e-9, rate)
            self._console.print(
                f"{self._phase}: {self._done}/{self._total}  {rate:.1f}/s  {left:.0f} s left  {self._detail}".rstrip(), highlight=False
            )

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Takes the numbers that stand beside the bar."""
        digits, unit = (4, "tokens/s") if self._wide else (3, "tok/s")
        loss, divergence = (f"{name} {metrics[name]:.{digits}f}" for name in ("loss", "divergence"))
        self._detail = f"{loss}  {divergence}  {metrics['tokens_per_second']:.0f} {unit}"
        if not metrics["taken"]:
            self.note(f"step {metrics['step']}: the gradient was not finite, the step was skipped")

    def note(self, message: str) -> None:
        """A line above the bar."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Takes the bars off the screen while the block runs."""
        self._bars.stop()
        try:
            yield
        finally:
            self._bars.start()

    def stop(self) -> None:
        """Asks the run to stop after this step; a second time, or where no step is under way, stops it now."""
        if self.stopping or self._phase not in ("train", "measure"):
            raise KeyboardInterrupt
        self.stopping = True
        self.note("stopping after this step; once more stops at once")


@contextmanager
def show() -> Iterator[Shown]:
    """Shows progress while the block runs; Ctrl-C asks it to stop."""
    shown = Shown(Console(file=sys.stderr))
    main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGINT, lambda number, frame: shown.stop()) if main else None
    try:
        with shown._bars:
            yield shown
    finally:
        if main:
            signal.signal(signal.SIGINT, previous)
