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


def install(folder: Path, **backends: Callable[[ModelOptions], Any]) -> None:
    """Writes a distribution into `folder`, which is then put on sys.path; `backends` are functions
    of modules, by the names that `--backend` takes."""
    name = "-".join(backends)
    info = folder / f"{name}-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines = [f"{key} = {one.__module__}:{one.__name__}\n" for key, one in backends.items()]
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
