"""A lock on a run folder, held while a process trains there.

The lock is the system's, on an open file: the system takes the lock back when the process ends,
also by kill -9 or when the machine goes down. The file's content only says who holds the lock.
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
"""What a file system that has no locks answers; ENOTSUP and EOPNOTSUPP are two numbers on a Mac."""

RANKS = ("RANK", "MLX_RANK", "OMPI_COMM_WORLD_RANK")
"""Where the launchers torchrun, mlx.launch and mpirun write a process's rank."""


class RunLock:
    """The lock of one run folder, until `release`, the end of this object, or the end of the
    process.

    `works` is False where the file system has no locks; nobody is refused then.
    """

    def __init__(self, path: Path, file: int, works: bool) -> None:
        self.works = works
        self.release = weakref.finalize(self, _release, path, file)


def take(folder: Path) -> RunLock:
    """Locks a run folder for this process. Raises FolderError where another process holds the
    lock."""
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
        os.close(file)  # of a lock that was released between opening and locking
    with suppress(OSError):  # a full disk: the lock holds all the same
        os.ftruncate(file, 0)
        os.lseek(file, 0, os.SEEK_SET)
        os.write(
            file, f"{json.dumps({'pid': os.getpid(), 'host': socket.gethostname()})}\n".encode()
        )
    return RunLock(path, file, works)


def check(folder: Path) -> None:
    """Raises FolderError where a process trains in `folder`; writes nothing."""
    try:
        file = os.open(folder / FILE, os.O_RDWR)
    except OSError:
        return
    _lock(file, folder)
    os.close(file)


def is_first_process() -> bool:
    """Whether this is the first, or the only, process of a run; known before any backend is
    loaded."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0") == "0"


def _lock(file: int, folder: Path) -> bool:
    """Locks an open file, and says whether the system could.

    Closes the file and raises FolderError where another process has the lock.
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
    # The name goes before the lock: whoever has opened the file meanwhile finds that the name has
    # gone.
    if _names(path, file):
        with suppress(OSError):
            path.unlink()
    os.close(file)


def _holder(folder: Path) -> str:
    try:
        found: Any = json.loads(read_file(folder / FILE))
        return f" (pid {int(found['pid'])} on {str(found['host'])[:100]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _names(path: Path, file: int) -> bool:
    """Whether `path` is the name of an open file."""
    try:
        named, opened = path.stat(), os.fstat(file)
    except OSError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
