"""The protocol by which a run reports events, and two implementations: the progress bar and the run
folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from opd.method.step import StepResult
from opd.progress import Progress
from opd.run import records
from opd.run.folder import RunFolder
from opd.types import Encoder
from opd.views.usable import Skipped


class Monitor(Protocol):
    """Receives the events of a run, in order, on every process."""

    def step(self, result: StepResult) -> None:
        """A step is done; `result` says whether it was taken."""

    def measured(self, step: int, accuracies: Mapping[str, Any]) -> None:
        """The student was measured after `step` steps; `accuracies` as in
        `opd.measure.gap.accuracies`."""

    def interrupted(self) -> None:
        """The run ends before the last step."""

    def ended(self, summary: Mapping[str, Any]) -> None:
        """The run is finished; `summary` is the content of summary.json."""


@dataclass(frozen=True)
class Shown:
    """Shows steps on the progress bar."""

    progress: Progress

    def step(self, result: StepResult) -> None:
        """Advances the bar."""
        self.progress.step(result.metrics)
        self.progress.advance(1)

    def measured(self, step: int, accuracies: Mapping[str, Any]) -> None:
        """Shows nothing, since a table follows at the end."""

    def interrupted(self) -> None:
        """Shows nothing, since an error follows."""

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Shows nothing."""


@dataclass(frozen=True)
class Recorded:
    """Writes metrics, accuracies, summary and skipped rows into the run folder, and, every `every`
    steps (0: never), the completions of the step's first group."""

    folder: RunFolder
    encoder: Encoder
    every: int
    skipped: Skipped

    def step(self, result: StepResult) -> None:
        """Appends to metrics.jsonl, rollouts.jsonl and skipped.jsonl."""
        self.folder.append(records.METRICS, result.metrics)
        if self.every and (result.metrics["step"] - 1) % self.every == 0 and result.statistics:
            for row in completions(result, self.encoder):
                self.folder.append(records.ROLLOUTS, row)
        self.interrupted()

    def measured(self, step: int, accuracies: Mapping[str, Any]) -> None:
        """Adds a row to accuracy.jsonl, in the place of rows of the same or later steps."""
        earlier = [row for row in records.read(self.folder, records.ACCURACY) if row["step"] < step]
        self.folder.rewrite(records.ACCURACY, [*earlier, {"step": step, **accuracies}])

    def interrupted(self) -> None:
        """Appends the rows that were skipped since the last call to skipped.jsonl."""
        for row in self.skipped.new():
            self.folder.append(records.SKIPPED, row)

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Writes summary.json."""
        self.interrupted()
        self.folder.write("summary.json", summary)


def completions(result: StepResult, encoder: Encoder) -> list[dict[str, Any]]:
    """Rows for rollouts.jsonl: the completions of the step's first group, with statistics of every
    token."""
    rows = []
    first = zip(result.rollout.completions[0], result.statistics[0], strict=True)
    for completion, statistics in first:
        row = {
            "step": result.metrics["step"],
            "id": result.rollout.pairs[0].id,
            "text": encoder.decode(completion.tokens.tolist()),
            "finished": completion.finished,
            "tokens": completion.tokens.tolist(),
            "sampler_logprobs": _rounded(completion.logprobs),
        }
        for name, values in asdict(statistics).items():
            if values is not None:
                row[name] = _rounded(values)
        rows.append(row)
    return rows


def _rounded(values: NDArray[np.float32] | Sequence[float]) -> list[float]:
    """The values rounded to five decimals."""
    return [round(float(value), 5) for value in values]
