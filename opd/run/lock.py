"""Locks a run folder while a process trains there.

The operating system locks an open file, and releases the lock when the process ends, even by kill
-9 or a power failure. The content of the file only names the process for messages.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any

from opd.errors import FolderError
from opd.paths import read_file

FILE = ".lock"

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}
"""Error numbers of a file system without locks; ENOTSUP and EOPNOTSUPP differ on a Mac."""

RANKS = ("RANK", "MLX_RANK", "OMPI_COMM_WORLD_RANK")
"""Environment variables in which torchrun, mlx.launch and mpirun give a process its rank."""


class RunLock:
    """The lock of one run folder, held until `release()`, the end of this object, or the end of the
    process.

    `works` is False if the file system has no locks; then other processes are not kept out.
    """

    def __init__(self, path: Path, file: int, works: bool) -> None:
        self.works = works
        self.release = weakref.finalize(self, _release, path, file)


def take(folder: Path) -> RunLock:
    """Locks a run folder for this process. Raises FolderError if another process holds the lock, or
    the folder cannot be written."""
    path = folder.absolute() / FILE
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FolderError(
                f"run folder '{folder}' cannot be written: {error.strerror}"
            ) from error
        works = _lock(file, folder)
        if _names(path, file):
            break
        os.close(file)  # the lock file was removed between opening and locking: try once more
    with suppress(OSError):  # the lock holds even if the disk is full
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(
            file, f"{json.dumps({'pid': os.getpid(), 'host': socket.gethostname()})}\n".encode()
        )
    return RunLock(path, file, works)


def check(folder: Path) -> None:
    """Raises FolderError if a process trains in `folder`; writes nothing."""
    try:
        file = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return
    _lock(file, folder)
    os.close(file)


def is_first_process() -> bool:
    """Whether this process has rank 0 or is the only process of a run; can be asked before a
    backend is loaded."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def _lock(file: int, folder: Path) -> bool:
    """Locks an open file. Returns False if the file system has no locks.

    If another process holds the lock, closes the file and raises FolderError.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            return False
        os.close(file)
        raise FolderError(
            f"run folder '{folder}' is being trained by another process{_holder(folder)}; wait for"
            " its end, or stop it"
        ) from None
    return True


def _release(path: Path, file: int) -> None:
    # The file is unlinked before the lock is released, so that a process which has opened it
    # meanwhile sees in `take` that its lock file is gone.
    if _names(path, file):
        with suppress(OSError):
            path.unlink()
    os.close(file)


def _holder(folder: Path) -> str:
    """The process that holds the lock, for a message; empty if the file does not say it."""
    try:
        content: Any = json.loads(read_file(folder / FILE))
        return f" (pid {int(content['pid'])} on {str(content['host'])[:100]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _names(path: Path, file: int) -> bool:
    """Whether `path` still names the open file."""
    try:
        named, opened = path.stat(), os.fstat(file)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
