"""The protocol by which a run reports progress, and by which it is asked to stop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol


class Progress(Protocol):
    """Receives what a run reports. `opd_cli` shows a progress bar; `Quiet` shows nothing."""

    def begin(self, phase: str, total: int, done: int = 0) -> None:
        """A phase of `total` units begins; `done` of them are done already where a run resumes.

        "read" counts rows, "train" steps, and "before", "measure", "after" prompts.
        """

    def advance(self, units: int) -> None:
        """`units` more units of the current phase are done."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """A training step is done; `metrics` is the step's line of metrics.jsonl."""

    def note(self, message: str) -> None:
        """Tells a person `message`, one line."""

    def pause(self) -> AbstractContextManager[None]:
        """Frees the screen for another library's progress bars while the block runs."""

    @property
    def stopping(self) -> bool:
        """True once a person has asked the run to stop."""


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
