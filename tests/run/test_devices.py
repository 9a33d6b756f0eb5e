"""Pipes and devices in the place of files: reading one might wait, or go on, for ever."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import contextmanager

import pytest

from opd.errors import FolderError
from opd.run.folder import RunFolder
from opd.tiny import MODEL
from tests.cli.test_train import opd

PIPE = "it is a pipe or a device, not a file"


@contextmanager
def in_time(seconds: int = 20):
    """Raises TimeoutError in the code that is still running after `seconds`."""

    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def pipe(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize("command", ["train", "gap", "sample"])
@pytest.mark.parametrize("device", [None, "/dev/zero"])
def test_data_are_no_pipe_and_no_device(command, device, pipe):
    data = device or pipe
    with in_time():
        said = opd(command, "--data", data, "--model", "tiny", "--backend", "cpu", code=2)
    assert said.stderr.strip().splitlines()[-1] == f"opd: {data} cannot be read: {PIPE}"


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
    ],
)
def test_files_of_a_model_are_no_pipes(file, tmp_path):
    shutil.copytree(MODEL, tmp_path / "model", ignore=shutil.ignore_patterns(file))
    os.mkfifo(tmp_path / "model" / file)
    data = tmp_path / "pairs.jsonl"
    data.write_text('{"image": "a.png", "question": "q", "boxes": [[0, 0, 9, 9]]}')
    with in_time():
        said = opd("gap", "--model", tmp_path / "model", "--data", data, "--backend", "cpu", code=2)
    assert len(said.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("name", ["answers.jsonl", "metrics.jsonl"])
def test_records_of_a_run_are_no_pipes(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with in_time(), pytest.raises(FolderError, match=PIPE):
        RunFolder(tmp_path).rows(name)
