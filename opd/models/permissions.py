"""Gives written files the permissions of any new file, which the umask decides, so that others can
read results if the user lets them."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


def as_new(*files: Path) -> None:
    """Gives `files`, which a library has made readable by their owner alone, the permissions of a
    new file in the same folder."""
    for file in files:
        probe = file.with_name(f"{file.name}.probe")
        probe.touch()
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        with suppress(PermissionError):  # some file systems have no permissions
            file.chmod(mode)
