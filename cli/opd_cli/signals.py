"""Handles Ctrl-C, SIGTERM and SIGHUP: a run stops after the current step, with a checkpoint; other
commands stop at once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

TOGETHER = 0.3
"""A second SIGTERM within this many seconds counts as the first: `timeout` sends one to the process
and one to the process group."""


class Signals:
    """The handler of the signals; calls `ask` when a signal arrives. `received`: the number of the
    last signal."""

    def __init__(self) -> None:
        self.received = int(signal.SIGINT)
        self.ask: Callable[[], None] = _now
        self._last: dict[int, float] = {}

    @property
    def exit_code(self) -> int:
        """The exit code that shells use for a process ended by the signal: 130 for Ctrl-C, 143 for
        SIGTERM, 129 for SIGHUP."""
        return 128 + self.received

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Calls `ask`, unless the signal repeats an earlier one: a terminal that closes may send
        SIGHUP several times."""
        last, now = self._last.get(number), time.monotonic()
        self._last[number] = now
        if last is not None and (
            number == signal.SIGHUP or (number == signal.SIGTERM and now - last < TOGETHER)
        ):
            return
        self.received = number
        self.ask()


def _now() -> None:
    raise KeyboardInterrupt


_heard: list[Signals] = []


@contextmanager
def asking(ask: Callable[[], None]) -> Iterator[None]:
    """Lets signals call `ask` while the block runs, instead of raising KeyboardInterrupt."""
    before = [signals.ask for signals in _heard]
    for signals in _heard:
        signals.ask = ask
    try:
        yield
    finally:
        for signals, ask in zip(_heard, before, strict=True):
            signals.ask = ask


@contextmanager
def handled() -> Iterator[Signals]:
    """Installs the handler while a command runs. SIGHUP stays ignored if it is, as under nohup."""
    signals = Signals()
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, signals)
    _heard.append(signals)
    try:
        yield signals
    finally:
        _heard.pop()
        for number, handler in previous.items():
            signal.signal(number, handler)
