"""What a run tells while it goes on, and how it is asked to stop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Progress(Protocol):
    """What a run tells while it goes on. `opd_cli` shows it; `Quiet` does not."""

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """A phase begins, or goes on where `done` of its units are done.

        "read" counts rows, "train" steps, and "before", "measure", "after" prompts.
        """

    def advance(self, units: int) -> None:
        """So many units of the phase are done."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A step is done."""

    def note(self, message: str) -> None:
        """Something a person should know."""

    def pause(self) -> AbstractContextManager[None]:
        """Leaves the screen to somebody else's bars while the block runs."""

    @property
    def stopping(self) -> bool:
        """True once a person asked to stop."""


class Quiet:
    """Shows nothing and never stops."""

    stopping = False

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """Shows no phase."""

    def advance(self, units: int) -> None:
        """Shows no bar."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Shows no metrics."""

    def note(self, message: str) -> None:
        """Shows no message."""

    def pause(self) -> AbstractContextManager[None]:
        """Leaves the screen as it is."""
        return nullcontext()
