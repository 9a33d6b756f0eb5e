"""One process at a time trains in a run folder."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opd.errors import FolderError
from opd.run import lock
from opd.run.folder import RunFolder
from tests.cli.test_mistakes import content, refused
from tests.cli.test_train import FAST, opd

HOLD = """
import sys, time
from pathlib import Path
from opd.run import lock
held = lock.take(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def held(tmp_path):
    """A run folder that another process holds, and that process."""
    run = tmp_path / "run"
    RunFolder.create(run, "").release()
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert process.stdout.readline() == b"held\n"
    yield run, process
    process.kill()
    process.communicate()


def test_a_run_is_trained_by_one_process(held, monkeypatch):
    run, process = held
    monkeypatch.chdir(run.parent)
    who = (
        f"run folder 'run' is being trained by another process (pid {process.pid} on"
        f" {os.uname().nodename})"
    )
    for arguments in (["--resume", "run"], ["--out", "run", "--force"]):
        assert who in refused(run.parent, "train", *arguments)
    assert "holds a run" in refused(run.parent, "train", "--out", "run")
    with pytest.raises(FolderError, match="being trained"):
        RunFolder.create(run, "", force=True)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_holds_nothing(held, number):
    run, process = held
    process.send_signal(number)
    process.wait()
    lock.check(run)
    assert (run / lock.FILE).is_file()  # of the process that was killed; nobody minds
    taken = lock.take(run)
    assert json.loads((run / lock.FILE).read_text())["pid"] == os.getpid()
    with pytest.raises(FolderError):
        lock.take(run)
    taken.release()
    taken.release()
    assert content(run) == {Path("config.toml"): b""}


def test_training_releases_the_folder(tmp_path):
    """Also where it fails, so that a notebook goes on."""
    run = tmp_path / "run"
    opd("train", "--backend", "cpu", "--steps", 1, "--out", run, *FAST, "--set", "measure.count=0")
    assert not (run / lock.FILE).exists()
    (run / "checkpoints/step-000001/student.safetensors").write_bytes(b"cut")
    for _ in range(2):
        assert "is damaged" in opd("train", "--resume", run, code=2).stderr
    assert not (run / lock.FILE).exists()
    opd(
        *"train --backend cpu --steps 1 --out".split(),
        run,
        "--force",
        *FAST,
        "--set",
        "measure.count=0",
    )
    assert not (tmp_path / "run~1" / lock.FILE).exists()


@pytest.mark.parametrize("name", ["ENOLCK", "ENOSYS", "ENOTSUP", "EOPNOTSUPP", "EINVAL"])
def test_a_file_system_without_locks_refuses_nobody(tmp_path, monkeypatch, name):
    """By every number that a system has for it: on a Mac ENOTSUP is not EOPNOTSUPP."""

    def flock(file, operation):
        raise OSError(getattr(errno, name), "no locks")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    assert not lock.take(tmp_path).works
    assert {errno.ENOTSUP, errno.EOPNOTSUPP} <= lock.NO_LOCKS


def test_where_there_are_no_locks(tmp_path, monkeypatch):
    """Nobody is refused, and it is told."""

    def flock(file, operation):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    said = opd(
        *"train --backend cpu --steps 1 --out".split(),
        tmp_path / "run",
        *FAST,
        "--set",
        "measure.count=0",
    ).stderr
    assert "has no locks: nothing keeps a second process from training there" in said


@pytest.mark.parametrize("variable", lock.RANKS)
def test_of_several_processes_the_first_holds_the_lock(tmp_path, monkeypatch, variable):
    folder = RunFolder.create(tmp_path / "run", "")
    monkeypatch.setenv(variable, "1")
    assert RunFolder.open(folder.path).locked().lock is None
    monkeypatch.setenv(variable, "0")
    with pytest.raises(FolderError):
        RunFolder.open(folder.path).locked()
    folder.release()
