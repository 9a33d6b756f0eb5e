"""The run folder: all files that a run writes, each written whole or not at all.

config.toml, metrics.jsonl, rollouts.jsonl, answers.jsonl, accuracy.jsonl, summary.json, model/ or
adapter/, checkpoints/step-000040/
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from opd.errors import FolderError, RunError, one_line
from opd.models.find import CONFIG, checkpoint_of
from opd.paths import read_file, unusable
from opd.run import files, lock
from opd.run.strict_json import dumps

DEEPEST = "checkpoints/step-000000.partial/optimizer.safetensors"
"""The longest path that a run writes below its folder."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `path` holds config.toml."""

    path: Path
    lock: lock.RunLock | None = field(default=None, compare=False)
    """The lock that keeps other processes from training here; None if this process does not
    train."""
    writes: bool = field(default=True, compare=False)
    """Whether this process writes: of several that train one run, the first does."""
    anywhere: Callable[[bool], bool] = field(default=bool, compare=False)
    """Whether something holds in any of the processes that train this run; each calls it with its
    own answer, and waits for the others."""

    @staticmethod
    def check(path: Path, force: bool = False) -> None:
        """Raises FolderError if a run cannot start in `path`: the folder cannot be written, holds a
        run (and `force` is not set, or the run is being trained), or holds other files."""
        _check_name(path, path / DEEPEST, *([f"{path}~1"] if force else []))
        there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        if path.exists() and not path.is_dir():
            raise FolderError(f"run folder '{path}' is a file; name another with --out")
        if not there.is_dir() or not os.access(there, os.W_OK):
            raise FolderError(
                f"run folder '{path}' cannot be written: {there} is {_obstacle(there)}; name"
                " another with --out"
            )
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return
        if not (path / CONFIG).is_file():
            raise FolderError(f"run folder '{path}' exists and is no run; name another with --out")
        if not force:
            raise FolderError(
                f"run folder '{path}' holds a run; continue it with --resume, replace it with"
                " --force, or name another with --out"
            )
        lock.check(path)

    @staticmethod
    def create(path: Path, config: str, force: bool = False) -> RunFolder:
        """Makes a locked run folder with config.toml. With `force`, a run that is already in `path`
        is renamed to NAME~1, NAME~2, ...

        Raises FolderError if the folder is taken or cannot be written.
        """
        RunFolder.check(path, force)
        aside = _free(path) if (path / CONFIG).is_file() else None
        made = [
            folder
            for folder in (path, *path.absolute().parents)
            if folder == path or not folder.exists()
        ]
        held: lock.RunLock | None = None
        try:
            if aside:
                _set_aside(path, aside)
            path.mkdir(parents=True, exist_ok=True)
            held = lock.take(path)
            if (path / CONFIG).exists():
                held.release()
                raise FolderError(
                    f"another process has begun a run in '{path}'; name another with --out"
                )
            files.write_text(path / CONFIG, config)
        except OSError as error:
            if held:
                held.release()
            for folder in made:
                with suppress(OSError):  # a folder that is not empty stays
                    folder.rmdir()
            if aside and aside.exists():
                aside.rename(path)
            raise FolderError(
                f"run folder '{path}' cannot be written: {error.strerror}; name another with --out"
            ) from error
        return RunFolder(path, held)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """The folder of an existing run. Raises FolderError if there is none."""
        _check_name(path, path / CONFIG)
        checkpoint = checkpoint_of(path)
        if checkpoint:
            raise FolderError(f"'{path}' is a checkpoint of run '{checkpoint[0]}'; name the run")
        if not (path / CONFIG).is_file():
            raise FolderError(
                f"'{path}' is no run folder: it has no {CONFIG}"
                if path.exists()
                else f"run folder '{path}' not found"
            )
        return RunFolder(path)

    @property
    def model(self) -> Path:
        """The folder of the trained model."""
        return self.path / "model"

    def locked(self) -> RunFolder:
        """The same folder, locked by this process. Raises FolderError if another process holds the
        lock.

        If several processes train a run together, only the first takes the lock.
        """
        return replace(self, lock=lock.take(self.path)) if lock.is_first_process() else self

    def release(self) -> None:
        """Releases the lock, so that other processes can train here."""
        if self.lock:
            self.lock.release()

    def append(self, name: str, row: Mapping[str, Any]) -> None:
        """Appends one object to a .jsonl file."""
        if self.writes:
            path = self.path / name
            with files.guarded(path), path.open("a", encoding="utf-8") as file:
                file.write(dumps(row) + "\n")

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The objects of a .jsonl file, without an unfinished last line of a killed run. Raises
        FolderError for a damaged line."""
        return [row for _, row in self.numbered(name)]

    def numbered(
        self, name: str, remedy: str = "remove that line to go on"
    ) -> list[tuple[int, dict[str, Any]]]:
        """The `rows`, each with its line number from 1. `remedy`: the advice in the message of a
        FolderError."""
        path = self.path / name
        try:
            lines = read_file(path).split(b"\n") if path.exists() else []
        except OSError as error:
            raise FolderError(f"'{path}' cannot be read: {error.strerror or error}") from error
        rows = []
        for number, line in enumerate(lines[:-1], start=1):
            if line.strip():
                try:
                    rows.append((number, _object(line)))
                except (ValueError, RecursionError) as error:
                    raise FolderError(
                        f"'{path}' is damaged at line {number}: {one_line(error)}; {remedy}"
                    ) from error
        return rows

    def rewrite(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replaces a .jsonl file."""
        self._replace(name, "".join(dumps(row) + "\n" for row in rows))

    def write_config(self, config: str) -> None:
        """Replaces config.toml."""
        self._replace(CONFIG, config)

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Writes a .json file."""
        if self.writes:
            with files.guarded(self.path / name):
                files.write_json(self.path / name, value)

    def read(self, name: str) -> dict[str, Any]:
        """The object of a .json file. Raises OSError or ValueError if the file is missing or
        damaged."""
        return files.read_json(self.path / name)

    def replace_folder(
        self, name: str, fill: Callable[[Path], None], beside: Callable[[Path], None]
    ) -> None:
        """Replaces a folder of the run, or makes it. Every process calls it: `fill` writes on all
        of them into one temporary folder, then `beside` on the first alone.

        If any fails, all raise, and the folder stays as it was. Raises RunError if the disk is
        full.
        """
        path = self.path / name
        written = files.temporary(path)

        def first(write: Callable[[Path], None]) -> Callable[[], None]:
            return lambda: write(written) if self.writes else None

        with files.guarded(path):
            try:
                self._on_all(first(files.empty_folder))
                self._on_all(lambda: fill(written))
                self._on_all(first(beside))
                self._on_all(first(lambda source: files.move_folder(source, path)))
            except BaseException:
                if self.writes:  # half a folder would fill a full disk
                    shutil.rmtree(written, ignore_errors=True)
                raise

    def checkpoint(
        self, step: int, keep: int, fill: Callable[[Path], None], beside: Callable[[Path], None]
    ) -> None:
        """Writes the checkpoint of a step as `replace_folder` does, then removes all but the newest
        `keep`."""
        self.replace_folder(f"checkpoints/step-{step:06d}", fill, beside)
        if not self.writes:
            return
        for old, _ in self.checkpoints()[:-keep]:
            shutil.rmtree(self.path / "checkpoints" / f"step-{old:06d}")

    def _on_all(self, action: Callable[[], None]) -> None:
        """Runs an action that every process runs. Raises what it raised here, or RunError where it
        failed in another process."""
        failure: Exception | None = None
        try:
            action()
        except Exception as error:
            failure = error
        if self.anywhere(failure is not None):
            raise failure or RunError(f"another process could not write in '{self.path}'")

    def _replace(self, name: str, text: str) -> None:
        if self.writes:
            with files.guarded(self.path / name):
                files.write_text(self.path / name, text)

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Steps and folders of all complete checkpoints, oldest first."""
        checkpoints = []
        for path in (self.path / "checkpoints").glob("step-*"):
            if match := re.fullmatch(r"step-(\d{6,})", path.name):
                checkpoints.append((int(match[1]), path))
        return sorted(checkpoints)


def next_free(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free


def check_empty(path: Path) -> None:
    """Raises FolderError unless `path` is an empty folder, or can be made."""
    _check_name(path, f"{path}.partial", path / DEEPEST)
    there = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if path.is_dir() and any(path.iterdir()):
        raise FolderError(f"folder '{path}' is not empty; name another with --out")
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise FolderError(
            f"folder '{path}' cannot be written: {there} is {_obstacle(there)}; name another with"
            " --out"
        )


def _check_name(*paths: Path | str) -> None:
    """Raises FolderError if no file can have one of `paths`."""
    for path in paths:
        fault = unusable(path)
        if fault:
            raise FolderError(fault)


def _set_aside(path: Path, aside: Path) -> None:
    """Renames the run in `path` to `aside`. Raises FolderError if a process trains it."""
    held = lock.take(path)
    try:
        path.rename(aside)
        (aside / lock.FILE).unlink(missing_ok=True)
    finally:
        held.release()


def _free(path: Path) -> Path:
    """The first of NAME~1, NAME~2, ... that does not exist."""
    number = 1
    while path.with_name(f"{path.name}~{number}").exists():
        number += 1
    return path.with_name(f"{path.name}~{number}")


def _obstacle(path: Path) -> str:
    """The reason why nothing can be written into `path`, in words."""
    return "not writable" if path.is_dir() else "not a folder"


def _object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises ValueError."""
    value = json.loads(line.decode("utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value
