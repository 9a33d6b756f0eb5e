"""Paths as people write them: expands `~`, and says in one line why no file can have a path."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

SHOWN = 40
"""Characters of an over-long name that a message shows."""

STEM = 120
"""The default run folder is named after the data file, by at most this many bytes of the file's
name; file systems allow 255."""


def expanded(text: str) -> str:
    """`text` with `~` and `~user` replaced by home folders. Raises ValueError if no file can have
    this path."""
    path = os.path.expanduser(text) if text.startswith("~") else text
    fault = unusable(path)
    if fault:
        raise ValueError(fault)
    return path


PathText = Annotated[str, AfterValidator(expanded)]
"""The type of a recipe option that holds a path; `expanded` validates it."""


def unusable(path: str | Path) -> str:
    """The reason why no file can have this path, for a message; empty if a file can."""
    text = str(path)
    shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    try:
        existing = Path(text).absolute()
        missing = []
        os.stat(existing)
    except FileNotFoundError:
        while not os.path.exists(existing):
            missing.append(existing.name)
            existing = existing.parent
    except OSError as error:
        return _fault(error, shown, text)
    except ValueError:  # a NUL character, or half of a surrogate pair
        return f"the path {shown} holds characters that no file name holds"
    for name in missing:  # os.stat stops at the first missing name, so each name is tried alone
        try:
            os.stat(existing / name)
        except OSError as error:
            fault = _fault(error, shown, text)
            if fault:
                return fault
    return ""


def _fault(error: OSError, shown: str, text: str) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return (
            f"the path {shown} is too long, with {len(text):,} characters; a name in it may have"
            " about 250"
        )
    if error.errno == errno.ELOOP:
        return f"the path {shown} is a circle of links"
    return ""


def stem(name: str) -> str:
    """A folder name made from a file's name: without the suffix, and cut to STEM bytes, so that -2
    or ~1 can follow."""
    return Path(name).stem.encode("utf-8", "ignore")[:STEM].decode("utf-8", "ignore") or "run"


def cache_folder() -> Path:
    """The folder for what can be made again: `opd` in $XDG_CACHE_HOME, else in ~/.cache."""
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "opd"


def check_file(path: Path) -> None:
    """Raises OSError for a pipe or a device: reading one may wait, or go on, for ever."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def read_file(path: Path) -> bytes:
    """A file's content. Raises OSError, for a pipe or a device too."""
    check_file(path)
    return path.read_bytes()


def read_start(path: Path, size: int) -> bytes:
    """The first `size` bytes of a file; none of a folder, a pipe, a device, or what cannot be
    read."""
    try:
        check_file(path)
        with path.open("rb") as file:
            return file.read(size)
    except OSError:
        return b""
