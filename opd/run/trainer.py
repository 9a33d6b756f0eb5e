"""A run as an object: what it trains, on what, where it writes; `train` runs it from where it
stands to its summary."""

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
    """One run. `name`: the backend's; `monitors` hear of the run beside the progress bar and the
    run folder."""

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
    """Where the run stands."""
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
        """Loads the last checkpoint, and returns the steps that are done; `train` does so where
        nobody has. Raises FolderError."""
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

        Raises Stopped when asked to, RunError where the run cannot go on; the folder then holds a
        checkpoint to resume from.
        """
        try:
            return self._train()
        finally:
            self._restored = False
            self.folder.release()

    def take(self, step: int, batch: Batch) -> StepResult:
        """A step; where memory does not suffice it is taken again with half the budgets, which
        changes no result."""
        while True:
            try:
                return train_step(step, batch, self.method, self.backend)
            except OutOfMemory:
                smaller = self.method.with_half_the_budgets()
                # other processes are in the middle of the step
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
        found = summary(
            facts, records.read(self.folder, records.METRICS), before, after, len(self.held_out)
        )
        for monitor in monitors:
            monitor.ended(found)
        self._tell_skipped(found["prompts_skipped"], skipped)
        return found

    def _tell(self) -> None:
        """What a person should know of the rows before the first step."""
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
        """How many prompts of the run fell out, and why."""
        drawn = self.recipe.run.steps * self.recipe.rollout.prompts
        if count:
            share, names = (
                f"{count:,} of {plural(drawn, 'prompt')} ({count / drawn:.1%})",
                self.folder.path / records.SKIPPED,
            )
            self.progress.note(f"{share} could not be used: {skipped.why()}; named in {names}")

    def _anywhere(self, here: bool) -> bool:
        return bool(self.backend.total(np.array([float(here)])).any())

    def _beside(self, folder: Path) -> None:
        """Writes what stands beside the trained weights."""
        self.encoder.save(folder)
        write_beside(self.recipe, folder, self.recipe.run.steps)
