"""The loop of a run: takes the remaining steps, tells monitors about them, measures in between, and
saves checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from opd.errors import RunError, Stopped
from opd.measure.gap import Answered
from opd.method.step import NO_PROMPT, Batch, StepResult
from opd.prefetch import prefetch
from opd.progress import Progress
from opd.run.batches import Batches
from opd.run.checkpoint import Saver, State
from opd.run.idle import IDLE_STEPS, ended
from opd.run.monitors import Monitor
from opd.run.probe import Probe


@dataclass(frozen=True)
class Loop:
    """The parts of a run. `take` takes a step, as `opd.method.step.train_step` does."""

    batches: Batches
    take: Callable[[int, Batch], StepResult]
    monitors: Sequence[Monitor]
    probe: Probe
    saver: Saver
    progress: Progress

    def run(self, state: State, before: Sequence[Answered], steps: int) -> None:
        """Takes the steps after `state.step`, up to `steps`. `before`: the answers before training.

        Raises Stopped if `progress.stopping` becomes true, RunError if the run cannot continue. A
        checkpoint of the last step is written first.
        """
        first = state.step + 1
        for step, batch in enumerate(prefetch(self.batches.encode, range(first, steps + 1)), first):
            if self.batches.lack_prompts(batch):
                if why := self.batches.none_usable():
                    self._end(state, f"step {step}: {NO_PROMPT}, and {why}")
                batch = Batch((), batch.skipped)
            result = self.take(step, batch)
            for monitor in self.monitors:
                monitor.step(result)
            not_taken = result.metrics.get("not_taken")
            state.count(step, not_taken)
            if not_taken:
                self.progress.note(f"step {step}: {not_taken}, so the step was not taken")
            if len(state.idle) >= IDLE_STEPS:
                self._end(state, ended(step, state.idle))
            self.probe.between(step, before)
            stopping = self.saver.folder.anywhere(self.progress.stopping)
            if stopping or self.saver.due(step):
                self.saver.save(state)
            if stopping:
                raise Stopped(
                    f"stopped after step {step}; go on with: opd train --resume"
                    f" {self.saver.folder.path}"
                )

    def _end(self, state: State, why: str) -> NoReturn:
        """Saves a checkpoint if a step was taken, and raises RunError."""
        for monitor in self.monitors:
            monitor.interrupted()
        if not self.saver.saved(state):
            self.saver.save(state)
        raise RunError(why)
