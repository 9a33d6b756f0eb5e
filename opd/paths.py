"""Paths as people write them: `~` is a home folder, and a path that no file system holds is told in
one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

SHOWN = 40
"""Characters of an over-long name that a message shows."""

STEM = 120
"""Bytes of a data file's name that the default run folder is named with; a name holds 255."""


def expanded(text: str) -> str:
    """The path with `~` and `~user` replaced. Raises ValueError where no file can have such a
    path."""
    path = os.path.expanduser(text) if text.startswith("~") else text
    fault = unusable(path)
    if fault:
        raise ValueError(fault)
    return path


PathText = Annotated[str, AfterValidator(expanded)]
"""A path among the options of a recipe."""


def unusable(path: str | Path) -> str:
    """Why no file can have this path; empty where one can."""
    text = str(path)
    shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    try:
        there = Path(text).absolute()
        missing = []
        os.stat(there)
    except FileNotFoundError:
        while not os.path.exists(there):
            missing.append(there.name)
            there = there.parent
    except OSError as error:
        return _fault(error, shown, text)
    except ValueError:  # a NUL character, or half of a surrogate pair
        return f"the path {shown} holds characters that no file name holds"
    for name in missing:  # the system looks at no name behind the first that is missing
        try:
            os.stat(there / name)
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
    """A folder's name after a file's: without the ending, and short enough to be followed by -2 or
    ~1."""
    return Path(name).stem.encode("utf-8", "ignore")[:STEM].decode("utf-8", "ignore") or "run"


def check_file(path: Path) -> None:
    """Raises OSError for a pipe or a device: reading one may wait, or go on, for ever."""
    if path.exists() and not path.is_dir() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a file", str(path))


def read_file(path: Path) -> bytes:
    """A file's content. Raises OSError, for a pipe or a device too."""
    check_file(path)
    return path.read_bytes()
