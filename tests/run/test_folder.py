from __future__ import annotations

import os

import pytest
from click.testing import CliRunner

from opd.errors import FolderError, RunError, Stopped
from opd.progress import Quiet
from opd.run.folder import RunFolder
from opd.testing.toy import Together
from opd_cli import main
from tests.run.test_loop import trainer as toy_trainer


def nothing(path):
    """Nothing stands beside the weights."""


def test_a_run_is_never_overwritten(tmp_path):
    run = tmp_path / "run"
    RunFolder.create(run, "first")
    with pytest.raises(
        FolderError,
        match=(
            "holds a run; continue it with --resume, replace it with --force, or name another with"
            " --out"
        ),
    ):
        RunFolder.create(run, "second")
    RunFolder.create(run, "second", force=True)
    RunFolder.create(run, "third", force=True)
    assert [
        (tmp_path / name / "config.toml").read_text() for name in ("run", "run~1", "run~2")
    ] == ["third", "first", "second"]


def test_somebody_elses_folder_is_never_touched(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("cat")
    for force in (False, True):
        with pytest.raises(FolderError, match="exists and is no run"):
            RunFolder.create(tmp_path / "photos", "config", force)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FolderError, match="is a file"):
        RunFolder.create(tmp_path / "file", "config")
    with pytest.raises(FolderError, match="cannot be written"):
        RunFolder.create(tmp_path / "file/run", "config")


def test_checkpoints_are_whole_or_not_there(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "config")

    def fail(path):
        (path / "half").write_text("x")
        raise MemoryError

    for step in (1, 2, 3):
        folder.checkpoint(
            step, 2, lambda path, step=step: (path / "weights").write_text(str(step)), nothing
        )
    with pytest.raises(MemoryError):
        folder.checkpoint(4, 2, fail, nothing)
    # A killed process cannot remove what it has begun.
    unfinished = folder.path / "checkpoints" / "step-000005.partial"
    unfinished.mkdir()
    kept = [(step, (path / "weights").read_text()) for step, path in folder.checkpoints()]
    assert kept == [(2, "2"), (3, "3")]


def test_a_full_disk_is_one_line(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "config")

    def full(path):
        raise OSError(28, "No space left on device")

    with pytest.raises(
        RunError, match="cannot be written: No space left on device; what was saved before stays"
    ):
        folder.checkpoint(1, 1, full, nothing)


def on_two_processes(tmp_path, fill, beside=nothing):
    """Two toy processes replace a folder of one run together: what each of them raised, or None."""
    run, raised = RunFolder.create(tmp_path / "run", "config"), {}

    def train(backend):
        trainer = toy_trainer(tmp_path / "run", backend=backend)
        try:
            trainer.folder.checkpoint(1, 2, lambda path: fill(backend.rank, path), beside)
        except Exception as error:
            raised[backend.rank] = error
        else:
            raised[backend.rank] = None

    Together.start(2, train)
    return run, raised


def test_every_process_saves_into_one_folder(tmp_path):
    """What each of them holds arrives; what stands beside it is written once."""
    beside = []

    def fill(rank, path):
        assert path.is_dir()
        (path / f"part-{rank}").write_text(str(rank))

    run, raised = on_two_processes(tmp_path, fill, beside.append)
    assert raised == {0: None, 1: None}
    assert len(beside) == 1
    ((step, checkpoint),) = run.checkpoints()
    assert (step, sorted(path.name for path in checkpoint.iterdir())) == (1, ["part-0", "part-1"])


@pytest.mark.parametrize("failing", [0, 1])
def test_where_one_process_cannot_write_none_goes_on(tmp_path, failing):
    def fill(rank, path):
        (path / f"part-{rank}").write_text(str(rank))
        if rank == failing:
            raise OSError(28, "No space left on device")

    run, raised = on_two_processes(tmp_path, fill)
    assert "No space left on device" in str(raised[failing])
    assert "another process could not write" in str(raised[1 - failing])
    assert run.checkpoints() == []
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path):
    run, stopped = RunFolder.create(tmp_path / "run", "config"), {}

    def train(backend):
        class Asked(Quiet):
            steps = 0

            def step(self, metrics):
                self.steps += 1

            @property
            def stopping(self):
                return backend.rank == 1 and self.steps == 2

        with pytest.raises(Stopped) as said:
            toy_trainer(
                tmp_path / "run", "measure.count=0", backend=backend, progress=Asked()
            ).train()
        stopped[backend.rank] = str(said.value)

    Together.start(2, train)
    assert [step for step, _ in run.checkpoints()] == [2]
    assert all(
        line.startswith("stopped after step 2; go on with: opd train --resume")
        for line in stopped.values()
    )
    assert len(stopped) == 2


def test_a_half_written_line_is_passed_over(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "config")
    folder.append("metrics.jsonl", {"step": 1, "text": "ä\n"})
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 2')
    assert folder.rows("metrics.jsonl") == [{"step": 1, "text": "ä\n"}]
    assert folder.rows("rollouts.jsonl") == []


def test_a_damaged_line_is_named(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "config")
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(
        FolderError, match=r"metrics.jsonl' is damaged at line 2: .*; remove that line to go on"
    ):
        folder.rows("metrics.jsonl")


def test_half_a_folder_does_not_stay(tmp_path):
    folder = RunFolder.create(tmp_path / "run", "config")
    folder.checkpoint(1, 2, lambda path: (path / "whole").touch(), nothing)

    def full(path):
        (path / "half").touch()
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError):
        folder.checkpoint(2, 2, full, nothing)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000001"]


def test_no_run_is_no_run(tmp_path):
    with pytest.raises(FolderError, match=r"run folder '.*nowhere' not found"):
        RunFolder.open(tmp_path / "nowhere")
    with pytest.raises(FolderError, match=r"is no run folder: it has no config.toml"):
        RunFolder.open(tmp_path)


def test_the_model_of_a_checkpoint_that_cannot_be_written_is_exported(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    few = ["rollout.prompts=1", "rollout.completions=1", "rollout.max_tokens=4", "measure.count=1"]
    sets = [part for one in few for part in ("--set", one)]
    run = str(tmp_path / "run")
    result = CliRunner().invoke(
        main, ["train", "tiny", "--backend", "cpu", "--steps", "1", "--out", run, *sets]
    )
    assert result.exit_code == 0, result.output
    checkpoint = f"{run}/checkpoints/step-000001"
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: str(path) != checkpoint and access(path, mode)
    )
    result = CliRunner().invoke(main, ["gap", "--model", checkpoint, "--backend", "cpu"])
    assert result.exit_code == 2
    assert f"export it: opd export {checkpoint} --out FOLDER" in result.output
