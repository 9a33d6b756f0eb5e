"""Recognises run folders and the checkpoints in them."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.toml"
"""A folder that holds this file is a run folder."""


def checkpoint_of(path: Path) -> tuple[Path, int] | None:
    """The run folder and the step of a checkpoint's folder; None for any other folder."""
    place = path.absolute()
    match = re.fullmatch(r"step-(\d{6,})", place.name)
    run = place.parent.parent
    if match and place.parent.name == "checkpoints" and (run / CONFIG).is_file():
        return path.parent.parent if path.parent.parent.absolute() == run else run, int(match[1])
    return None
