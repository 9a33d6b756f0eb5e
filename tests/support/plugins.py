"""Backends that break in a way of their own, installed as other people's are: by an entry point.

So a command runs on them by `--backend NAME`, and nothing of the product is patched.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opd.types import ModelOptions
from tests.support.recorder import Recorder, letters


def install(folder: Path, *backends: Callable[[ModelOptions], Any]) -> None:
    """Writes a distribution into `folder`, which is then put on sys.path; `backends` are functions
    of modules, after which they are called."""
    info = folder / "plugins-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugins\nVersion: 1\n")
    lines = [f"{one.__name__} = {one.__module__}:{one.__name__}\n" for one in backends]
    (info / "entry_points.txt").write_text("[opd.backends]\n" + "".join(lines))


def faulty(options: ModelOptions) -> None:
    """A fault of a program, whose message would steer a terminal."""
    raise ValueError("\x1b[2J\u202ehidden")


def full(options: ModelOptions) -> None:
    """A machine whose memory does not suffice."""
    raise MemoryError


def interrupted(options: ModelOptions) -> None:
    """A signal to this process, as a person or a scheduler sends it: that of $SIGNAL."""
    os.kill(os.getpid(), getattr(signal, os.environ["SIGNAL"]))


class Filling(Recorder):
    """From step 3 on, nothing more can be added to the metrics of run/."""

    def apply(self, update: Any) -> Any:
        if sum(call.name == "apply" for call in self.calls) == 2:
            Path("run/metrics.jsonl").unlink()
            Path("run/metrics.jsonl").symlink_to("/dev/full")
        return super().apply(update)


def filling(options: ModelOptions) -> Filling:
    """A disk that is full at step 3."""
    return Filling(options, letters)
