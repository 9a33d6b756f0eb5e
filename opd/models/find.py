"""Where a model is: in a folder, a run, or one of a run's checkpoints."""

from __future__ import annotations

import re
from pathlib import Path

CONFIG = "config.toml"
"""The file by which a folder is a run's."""


def checkpoint_of(path: Path) -> tuple[Path, int] | None:
    """The run and the step of a checkpoint's folder; None for any other folder."""
    place = path.absolute()
    match = re.fullmatch(r"step-(\d{6,})", place.name)
    run = place.parent.parent
    if match and place.parent.name == "checkpoints" and (run / CONFIG).is_file():
        return path.parent.parent if path.parent.parent.absolute() == run else run, int(match[1])
    return None
