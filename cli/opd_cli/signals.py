"""Ctrl-C, SIGTERM and SIGHUP: a run stops after its step, with a checkpoint; anything else stops at
once."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")

TOGETHER = 0.3
"""Seconds in which a second SIGTERM is the same one: `timeout` sends it to the process and to its
group."""


class Signals:
    """What was received, and who is asked to stop."""

    def __init__(self) -> None:
        self.received = int(signal.SIGINT)
        self.ask: Callable[[], None] = _now
        self._last: dict[int, float] = {}

    @property
    def exit_code(self) -> int:
        """As a shell tells a process that was ended by the signal: 130 for Ctrl-C, 143 for SIGTERM,
        129 for SIGHUP."""
        return 128 + self.received

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Asks to stop; a second time stops at once. A terminal that closes may send SIGHUP several
        times: it only asks."""
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
    """Calls `ask` when a signal comes while the block runs; without, the block is interrupted."""
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
    """Hears the signals while a command runs; SIGHUP not where it is ignored, as under nohup."""
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
