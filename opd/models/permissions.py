"""Permissions of what is written: those of any new file, by the umask, so that results are readable
by whom a person lets read."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def as_new(*files: Path) -> None:
    """Gives `files`, which a library made readable by their owner alone, the permissions that a new
    file beside them gets."""
    for file in files:
        probe = file.with_name(f"{file.name}.probe")
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        with suppress(PermissionError):  # a file system without permissions
            file.chmod(mode)
