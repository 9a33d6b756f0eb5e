"""Saves and restores the state of a run in checkpoints."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from opd.backend import Backend
from opd.errors import FolderError
from opd.run import files, records
from opd.run.folder import RunFolder

STATE = "state.json"


@dataclass
class State:
    """The state of a run: the last `step` that is done, `seconds` of training over all resumptions,
    the number of steps that were `taken`, and `idle`, the reasons why the steps since the last
    taken step were not taken."""

    step: int = 0
    seconds: float = 0.0
    taken: int = 0
    idle: list[str] = field(default_factory=list)

    def count(self, step: int, not_taken: str | None) -> None:
        """Counts a step; `not_taken` is the reason why it was not taken, or None."""
        self.step = step
        if not_taken is None:
            self.taken, self.idle = self.taken + 1, []
        else:
            self.idle.append(not_taken)


@dataclass(frozen=True)
class Saver:
    """Writes a checkpoint every `every` steps (0: only after the last step), and keeps the newest
    `keep`."""

    folder: RunFolder
    backend: Backend
    every: int
    keep: int
    steps: int
    started: float
    """The start of the run by `time.monotonic`, as if it had never been interrupted."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return step == self.steps or bool(self.every and step % self.every == 0)

    def saved(self, state: State) -> bool:
        """Whether the state's last step is in a checkpoint."""
        checkpoints = self.folder.checkpoints()
        return self.folder.anywhere(bool(checkpoints) and checkpoints[-1][0] >= state.step)

    def save(self, state: State) -> None:
        """Writes a checkpoint, unless no step was taken yet."""
        if not state.taken:
            return
        state.seconds = time.monotonic() - self.started

        def beside(checkpoint: Path) -> None:
            files.write_json(checkpoint / STATE, asdict(state))

        self.folder.checkpoint(state.step, self.keep, self.backend.save, beside)


def restore(folder: RunFolder, backend: Backend) -> State:
    """Loads the last checkpoint, and removes the rows of later steps from the run's files. Without
    a checkpoint, the state is that of the beginning. Raises FolderError if a file is damaged."""
    state, checkpoints = State(), folder.checkpoints()
    if checkpoints:
        done, path = checkpoints[-1]
        earlier = f"go on from step {checkpoints[-2][0]}" if len(checkpoints) > 1 else "start again"
        try:
            backend.load(path)
            saved = files.read_json(path / STATE)
            state = State(done, float(saved["seconds"]), int(saved["taken"]), list(saved["idle"]))
        except (OSError, ValueError, KeyError, TypeError, FolderError) as error:
            raise FolderError(
                f"checkpoint '{path}' is damaged: {error}; remove it to {earlier}"
            ) from error
    for name in (records.METRICS, records.ROLLOUTS, records.ACCURACY):
        rows = records.read(folder, name)
        folder.rewrite(name, [row for row in rows if row["step"] <= state.step])
    # Rewriting drops a half-written last row; the next row would continue that line.
    if (folder.path / records.SKIPPED).exists():
        folder.rewrite(records.SKIPPED, records.read(folder, records.SKIPPED))
    return state
