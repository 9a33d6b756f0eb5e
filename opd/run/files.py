"""Files and folders that are written whole or not at all.

Each is written under a temporary name, NAME.partial, and then renamed, so that a killed process or
a full disk leaves what was there before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from opd.errors import RunError
from opd.paths import read_file
from opd.run.strict_json import dumps


def write_text(path: Path, text: str) -> None:
    """Writes a file as UTF-8. Raises OSError if the disk is full or the folder is gone."""
    written = temporary(path)
    try:
        written.write_text(text, encoding="utf-8")
        os.replace(written, path)
    except OSError:
        written.unlink(missing_ok=True)  # half a file on a full disk
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as indented JSON. Raises OSError as `write_text` does."""
    write_text(path, dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file. Raises OSError or ValueError if it is missing or damaged."""
    return dict(json.loads(read_file(path)))


def temporary(path: Path) -> Path:
    """Where a file or folder is written before it is renamed."""
    return path.with_name(f"{path.name}.partial")


def empty_folder(path: Path) -> None:
    """Makes a new, empty folder in place of whatever is there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def move_folder(source: Path, path: Path) -> None:
    """Puts a folder in place of another one."""
    shutil.rmtree(path, ignore_errors=True)
    source.rename(path)


def replace_folder(path: Path, fill: Callable[[Path], None], shared: bool = False) -> None:
    """Replaces the folder `path`, or makes it: `fill` writes a temporary folder beside it.

    With `shared`, several processes may write the same content at once; the folder of the first
    one stays. If `fill` raises, the folder stays as it was. Raises RunError if the disk is full.
    """
    written = path.with_name(f"{path.name}.{os.getpid()}.partial") if shared else temporary(path)
    with guarded(path):
        empty_folder(written)
        try:
            fill(written)
            if not shared:
                return move_folder(written, path)
            try:
                written.rename(path)
            except OSError:
                if not path.is_dir():
                    raise
                shutil.rmtree(written, ignore_errors=True)
        except BaseException:
            shutil.rmtree(written, ignore_errors=True)  # half a folder would fill a full disk
            raise


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turns an OSError of the block, such as a full disk, into a RunError of one line."""
    try:
        yield
    except OSError as error:
        raise RunError(
            f"'{path}' cannot be written: {error.strerror or error}; what was saved before stays"
        ) from error
