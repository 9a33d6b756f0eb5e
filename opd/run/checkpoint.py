"""Where a run stands, in its checkpoints: saved, and found again."""

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
    """Where a run stands: the last `step` that is done, `seconds` of all its parts, how many steps
    were `taken`, and the reasons for which the last ones were not (`idle`: one a step, empty after
    a step that was taken)."""

    step: int = 0
    seconds: float = 0.0
    taken: int = 0
    idle: list[str] = field(default_factory=list)

    def count(self, step: int, not_taken: str | None) -> None:
        """Counts a step that was taken, or the reason for which it was not."""
        self.step = step
        if not_taken is None:
            self.taken, self.idle = self.taken + 1, []
        else:
            self.idle.append(not_taken)


@dataclass(frozen=True)
class Saver:
    """Writes the checkpoints of a run: every `every` steps (0: the last alone), and keeps the
    newest `keep`."""

    folder: RunFolder
    backend: Backend
    every: int
    keep: int
    steps: int
    started: float
    """When the run would have begun in one go, by `time.monotonic`."""

    def due(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return step == self.steps or bool(self.every and step % self.every == 0)

    def saved(self, state: State) -> bool:
        """Whether the state's last step is in a checkpoint."""
        checkpoints = self.folder.checkpoints()
        return self.folder.anywhere(bool(checkpoints) and checkpoints[-1][0] >= state.step)

    def save(self, state: State) -> None:
        """Writes a checkpoint; nothing before the first step that was taken, when there is nothing
        to save."""
        if not state.taken:
            return
        state.seconds = time.monotonic() - self.started

        def beside(checkpoint: Path) -> None:
            files.write_json(checkpoint / STATE, asdict(state))

        self.folder.checkpoint(state.step, self.keep, self.backend.save, beside)


def restore(folder: RunFolder, backend: Backend) -> State:
    """Loads the last checkpoint, and drops the records of later steps; the beginning where there is
    none. Raises FolderError."""
    state, checkpoints = State(), folder.checkpoints()
    if checkpoints:
        done, path = checkpoints[-1]
        earlier = f"go on from step {checkpoints[-2][0]}" if len(checkpoints) > 1 else "start again"
        try:
            backend.load(path)
            found = files.read_json(path / STATE)
            state = State(done, float(found["seconds"]), int(found["taken"]), list(found["idle"]))
        except (OSError, ValueError, KeyError, TypeError, FolderError) as error:
            raise FolderError(
                f"checkpoint '{path}' is damaged: {error}; remove it to {earlier}"
            ) from error
    for name in (records.METRICS, records.ROLLOUTS, records.ACCURACY):
        rows = records.read(folder, name)
        folder.rewrite(name, [row for row in rows if row["step"] <= state.step])
    # a row behind a half-written one would be on its line
    if (folder.path / records.SKIPPED).exists():
        folder.rewrite(records.SKIPPED, records.read(folder, records.SKIPPED))
    return state
