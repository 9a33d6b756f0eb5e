"""Who hears what a run does: the run folder, the progress bar, and whoever else has these three
functions."""

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
    """Hears of a run on every process, in the order in which things happen."""

    def step(self, result: StepResult) -> None:
        """A step is done, taken or not."""

    def measured(self, step: int, accuracies: Mapping[str, Any]) -> None:
        """The model was measured after `step` steps; see `opd.measure.gap.accuracies`."""

    def interrupted(self) -> None:
        """The run ends before its last step."""

    def ended(self, summary: Mapping[str, Any]) -> None:
        """The run is done."""


@dataclass(frozen=True)
class Shown:
    """Shows steps as they go by."""

    progress: Progress

    def step(self, result: StepResult) -> None:
        """Moves the bar on."""
        self.progress.step(result.metrics)
        self.progress.advance(1)

    def measured(self, step: int, accuracies: Mapping[str, Any]) -> None:
        """Shows nothing: the table comes at the end."""

    def interrupted(self) -> None:
        """Shows nothing: the error says it."""

    def ended(self, summary: Mapping[str, Any]) -> None:
        """Shows nothing."""


@dataclass(frozen=True)
class Recorded:
    """Writes metrics, accuracies, summary, the rows that could not be used, and the completions of
    every `every`-th step's first group (0: of none)."""

    folder: RunFolder
    encoder: Encoder
    every: int
    skipped: Skipped

    def step(self, result: StepResult) -> None:
        """To metrics.jsonl and rollouts.jsonl."""
        self.folder.append(records.METRICS, result.metrics)
        if self.every and (result.metrics["step"] - 1) % self.every == 0 and result.statistics:
            for row in completions(result, self.encoder):
                self.folder.append(records.ROLLOUTS, row)
        self.interrupted()

    def measured(self, step: int, accuracies: Mapping[str, Any]) -> None:
        """To accuracy.jsonl: the gap as it closes."""
        earlier = [row for row in records.read(self.folder, records.ACCURACY) if row["step"] < step]
        self.folder.rewrite(records.ACCURACY, [*earlier, {"step": step, **accuracies}])

    def interrupted(self) -> None:
        """Rows that fell out since the last time, to skipped.jsonl."""
        for row in self.skipped.new():
            self.folder.append(records.SKIPPED, row)

    def ended(self, summary: Mapping[str, Any]) -> None:
        """To summary.json."""
        self.interrupted()
        self.folder.write("summary.json", summary)


def completions(result: StepResult, encoder: Encoder) -> list[dict[str, Any]]:
    """The first group's completions with their statistics, token by token."""
    pair, group, statistics = (
        result.rollout.pairs[0],
        result.rollout.completions[0],
        result.statistics[0],
    )
    return [
        {
            "step": result.metrics["step"],
            "id": pair.id,
            "text": encoder.decode(completion.tokens.tolist()),
            "finished": completion.finished,
            "tokens": completion.tokens.tolist(),
            "sampler_logprobs": _rounded(completion.logprobs),
            **{
                name: _rounded(values) for name, values in asdict(row).items() if values is not None
            },
        }
        for completion, row in zip(group, statistics, strict=True)
    ]


def _rounded(values: NDArray[np.float32] | Sequence[float]) -> list[float]:
    return [round(float(value), 5) for value in values]
