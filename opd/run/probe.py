"""Measures a run: before training, between steps if the recipe asks for it, and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from opd.backend import Backend
from opd.errors import plural
from opd.measure import gap
from opd.measure.gap import Answered
from opd.progress import Progress
from opd.run import records
from opd.run.folder import RunFolder
from opd.run.monitors import Monitor
from opd.run.recipe import Recipe
from opd.types import Encoder, Example
from opd.views.usable import Skipped


def answers(
    recipe: Recipe,
    backend: Backend,
    encoder: Encoder,
    held_out: Sequence[Example],
    progress: Progress,
    skipped: Skipped,
) -> list[Answered]:
    """The student's greedy answers to the held-out examples, with the recipe's view and lengths;
    examples that cannot be used are added to `skipped`."""
    return gap.greedy_answers(
        backend,
        encoder,
        held_out,
        recipe.view,
        recipe.measure.max_tokens,
        recipe.rollout.sample_tokens,
        progress.advance,
        recipe.data.max_prompt_tokens,
        skipped,
    )


@dataclass(frozen=True)
class Probe:
    """Lets the student answer the held-out examples, writes the answers into the run folder, and
    tells the monitors the accuracies."""

    recipe: Recipe
    backend: Backend
    encoder: Encoder
    held_out: Sequence[Example]
    folder: RunFolder
    monitors: Sequence[Monitor]
    progress: Progress
    skipped: Skipped

    def before(self, done: int) -> list[Answered]:
        """The answers before training: measured now, or read from the run folder if they are there.
        `done`: steps that the run has already done."""
        if written := records.before(self.folder):
            return written
        if done and self.held_out:
            self.progress.note(
                "no answers of before training are kept: what is called before is measured after"
                f" step {done}"
            )
        answered = self._answers("before")
        self._write("before", answered)
        self._tell(0, answered)
        return answered

    def between(self, step: int, before: Sequence[Answered]) -> None:
        """Measures after `step` if it is a multiple of measure.every, on the examples that were
        answered before."""
        every, steps = self.recipe.measure.every, self.recipe.run.steps
        if every and step % every == 0 and step < steps:
            self._tell(step, self._answers("measure", before))
            self.progress.begin("train", steps, step)

    def after(self, before: Sequence[Answered]) -> list[Answered]:
        """The answers after training, to the examples that were answered before."""
        answered = self._answers("after", before)
        self._write("after", answered)
        self._tell(self.recipe.run.steps, answered)
        return answered

    def _answers(self, phase: str, before: Sequence[Answered] | None = None) -> list[Answered]:
        """The student's current answers to the held-out examples; with `before`, only to those that
        are answered there."""
        if not self.held_out or (before is not None and not before):
            return []
        self.progress.begin(phase, 2 * len(self.held_out))
        answered = answers(
            self.recipe, self.backend, self.encoder, self.held_out, self.progress, self.skipped
        )
        rows = set(range(len(self.held_out)))
        if before is not None:
            rows = {answer.row for answer in before}
        answered = [answer for answer in answered if answer.row in rows]
        if missing := len(rows) - len(answered):
            which = "measured before" if before is not None else "to be measured"
            left = "they are left out of every comparison" if answered else "nothing is measured"
            self.progress.note(
                f"{missing} of {plural(len(rows), 'row')} {which} cannot be used; {left}"
            )
        return answered

    def _write(self, when: str, answered: Sequence[Answered]) -> None:
        """Writes the answers to answers.jsonl, in the place of earlier rows with the same `when`,
        "before" or "after"."""
        if answered:
            others = [
                row for row in records.read(self.folder, records.ANSWERS) if row["when"] != when
            ]
            rows = [{"when": when, **asdict(answer)} for answer in answered]
            self.folder.rewrite(records.ANSWERS, [*others, *rows])

    def _tell(self, step: int, answered: Sequence[Answered]) -> None:
        """Tells all monitors the accuracies after `step`."""
        if answered:
            accuracies = gap.accuracies(answered)
            for monitor in self.monitors:
                monitor.measured(step, accuracies)
