"""The trainer: holds model, data and run folder of one run, and trains it to the end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from opd.backend import Backend
from opd.errors import OutOfMemory, RunError, plural
from opd.method.step import Batch, Method, StepResult, train_step
from opd.progress import Progress, Quiet
from opd.run import records
from opd.run.batches import Batches
from opd.run.checkpoint import Saver, State, restore
from opd.run.folder import RunFolder
from opd.run.idle import IDLE_STEPS, ended
from opd.run.loop import Loop
from opd.run.monitors import Monitor, Recorded, Shown
from opd.run.probe import Probe
from opd.run.recipe import Recipe, write_beside
from opd.run.summary import summary
from opd.types import Encoder, Example
from opd.views.usable import Skipped


@dataclass
class Trainer:
    """One run. `name`: the name of the backend. `monitors` receive events in addition to progress
    bar and run folder."""

    recipe: Recipe
    backend: Backend
    encoder: Encoder
    examples: Sequence[Example]
    held_out: Sequence[Example]
    folder: RunFolder
    name: str = ""
    progress: Progress = field(default_factory=Quiet)
    monitors: Sequence[Monitor] = ()
    state: State = field(default_factory=State, init=False)
    """The state of the run after the last step."""
    _restored: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.folder = replace(self.folder, writes=self.backend.rank == 0, anywhere=self._anywhere)
        sections = (
            self.recipe.rollout,
            self.recipe.objective,
            self.recipe.teacher,
            self.recipe.optimizer,
        )
        run = self.recipe.run
        self.method = Method(*sections, run.seed, run.steps, self.encoder.stop, self.encoder.banned)

    def restore(self) -> int:
        """Loads the last checkpoint unless that is done already, and returns the number of steps
        that are done. `train` calls it. Raises FolderError."""
        if not self._restored:
            self.state = restore(self.folder, self.backend)
            self._restored = True
            if 0 < self.state.step < self.recipe.run.steps:
                self.progress.note(
                    f"going on after step {self.state.step} of {self.recipe.run.steps}"
                )
        return self.state.step

    def train(self) -> dict[str, Any]:
        """Trains from the last checkpoint, or from the start, and returns the summary.

        Raises Stopped if `progress.stopping` becomes true, RunError if the run cannot continue; the
        folder then holds a checkpoint to resume from.
        """
        try:
            return self._train()
        finally:
            self._restored = False
            self.folder.release()

    def take(self, step: int, batch: Batch) -> StepResult:
        """Takes a step. If memory does not suffice, retries it with half the budgets, which does
        not change the result. Raises OutOfMemory if that does not help."""
        while True:
            try:
                return train_step(step, batch, self.method, self.backend)
            except OutOfMemory:
                smaller = self.method.with_half_the_budgets()
                # With several processes, the others are in the middle of the step.
                if smaller is None or self.backend.size > 1:
                    raise
            self.method, now = smaller, smaller.rollout
            budgets = (
                f"rollout.microbatch_tokens = {now.microbatch_tokens} and rollout.sample_tokens ="
                f" {now.sample_tokens}"
            )
            self.progress.note(
                f"step {step}: out of memory; it is taken again, and the run goes on, with"
                f" {budgets}"
            )

    def _train(self) -> dict[str, Any]:
        steps, run = self.recipe.run.steps, self.recipe.run
        skipped = Skipped(self.progress, records.read(self.folder, records.SKIPPED))
        self.restore()
        state, started = self.state, time.monotonic() - self.state.seconds
        if state.step == steps and len(state.idle) >= IDLE_STEPS:
            raise RunError(ended(steps, state.idle))
        self._tell()
        recorded = Recorded(self.folder, self.encoder, run.rollouts_every, skipped)
        monitors: list[Monitor] = [recorded, Shown(self.progress), *self.monitors]
        probe = Probe(
            self.recipe,
            self.backend,
            self.encoder,
            self.held_out,
            self.folder,
            monitors,
            self.progress,
            skipped,
        )
        batches = Batches(self.recipe, self.backend, self.encoder, self.examples, skipped)
        saver = Saver(self.folder, self.backend, run.checkpoint_every, run.keep, steps, started)
        before = probe.before(state.step)
        self.progress.begin("train", steps, state.step)
        Loop(batches, self.take, monitors, probe, saver, self.progress).run(state, before, steps)
        if not state.taken:
            raise RunError(
                f"{ended(steps, state.idle)}; no step was taken, so there is no trained model to"
                " write"
            )
        result = self.recipe.model.result
        self.folder.replace_folder(
            result, lambda folder: self.backend.export(folder, result), self._beside
        )
        after = probe.after(before)
        facts = {
            "backend": self.name,
            "device": self.backend.device,
            "steps": steps,
            "seed": run.seed,
            "seconds": round(time.monotonic() - started, 1),
            "rows_skipped": len(getattr(self.examples, "skipped", ())),
            "rows_unusable": len(skipped.reasons),
        }
        metrics = records.read(self.folder, records.METRICS)
        result_summary = summary(facts, metrics, before, after, len(self.held_out))
        for monitor in monitors:
            monitor.ended(result_summary)
        self._tell_skipped(result_summary["prompts_skipped"], skipped)
        return result_summary

    def _tell(self) -> None:
        """Notes about the rows, before the first step."""
        steps, done = self.recipe.run.steps, self.state.step
        if done == steps:
            which = (
                "the one step of this run is"
                if steps == 1
                else f"all {steps} steps of this run are"
            )
            self.progress.note(f"{which} done; measuring again")
        elif self.held_out and not self.recipe.measure.path and self.recipe.data.path != "tiny":
            self.progress.note(
                "before and after are measured on rows that are trained on too; --set"
                " measure.path=FILE names held-out ones"
            )
        rows, prompts = len(self.examples), self.recipe.rollout.prompts
        if rows < prompts and done < steps:
            self.progress.note(
                f"{plural(rows, 'row')} for rollout.prompts = {prompts}: rows stand in a step more"
                " than once"
            )

    def _tell_skipped(self, count: int, skipped: Skipped) -> None:
        """A note about the `count` prompts of the run that were skipped, if there are any."""
        drawn = self.recipe.run.steps * self.recipe.rollout.prompts
        if count:
            share = f"{count:,} of {plural(drawn, 'prompt')} ({count / drawn:.1%})"
            file = self.folder.path / records.SKIPPED
            self.progress.note(f"{share} could not be used: {skipped.why()}; named in {file}")

    def _anywhere(self, here: bool) -> bool:
        return bool(self.backend.total(np.array([float(here)])).any())

    def _beside(self, folder: Path) -> None:
        """Writes what stands beside the trained weights."""
        self.encoder.save(folder)
        write_beside(self.recipe, folder, self.recipe.run.steps)
