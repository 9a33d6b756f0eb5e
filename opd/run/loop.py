"""The loop: measure, then roll out, differentiate, step, move the teacher and record, then measure again.

The whole method is `Trainer.step`. Nothing here knows a framework, and nothing reads an answer but measuring.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd import randomness
from opd.backend import Backend
from opd.errors import FolderError, RunError, Stopped
from opd.measure import gap as measure
from opd.method import rollout, schedules
from opd.method.rollout import Pair
from opd.prefetch import ahead
from opd.progress import Progress, Quiet
from opd.run import preflight, records
from opd.run.folder import RunFolder
from opd.run.recipe import Recipe, leave
from opd.run.records import SKIPPED
from opd.types import Encoder, Example, Group, Sampling, TokenStatistics
from opd.views import usable
from opd.views.usable import Skipped, Unusable

STATE = "state.json"

IDLE_STEPS = 5
"""So many steps in a row that were not taken end a run."""

GRADIENT = "the gradient was not finite"
OUTPUTS = "the model's log-probabilities were not finite"
WEIGHTS = "every row had weight 0"
NO_PROMPT = "no prompt of the step can be used"
EMPTY = "every completion was empty"
BANNED = "every completion held a banned token"

ADVICE = {
    GRADIENT: "lower optimizer.learning_rate, or set model.dtype=float32",
    OUTPUTS: "look for NaN in the model's weights, lower optimizer.learning_rate, or set model.dtype=float32",
    WEIGHTS: "give rows a weight above 0",
    NO_PROMPT: "mend or remove such rows, or raise rollout.prompts",
}
"""What a person may do about the reasons for which steps were not taken."""


@dataclass(frozen=True)
class Batch:
    """The encoded pairs of a step on this process, and the kinds of reasons for which examples could not be used."""

    pairs: tuple[Pair, ...]
    reasons: tuple[str, ...] = ()

    @property
    def skipped(self) -> int:
        """Examples that could not be used."""
        return len(self.reasons)


@dataclass
class Trainer:
    """One run: what it trains, on what, and where it writes."""

    recipe: Recipe
    backend: Backend
    encoder: Encoder
    examples: Sequence[Example]
    held_out: Sequence[Example]
    folder: RunFolder
    name: str = ""
    progress: Progress = field(default_factory=Quiet)
    _restored: tuple[int, float] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.taken = 0
        """Steps that were taken so far."""
        self.idle: list[str] = []
        """Why the last steps were not taken, one reason a step; empty after one that was."""
        self.skipped = Skipped(self.progress)
        """Rows that could not be used, in training or in measuring."""

    def train(self) -> dict[str, Any]:
        """Trains from the last checkpoint, or from the start, and returns the summary.

        Raises Stopped when asked to, RunError where the run cannot go on; the folder then holds a checkpoint to resume from.
        """
        try:
            return self._train()
        finally:
            self.folder.release()

    def restore(self) -> int:
        """Loads the last checkpoint, and returns the steps that are done; `train` does so where nobody has. Raises FolderError."""
        self._restored = self._restored or self._restore()
        return self._restored[0]

    def _train(self) -> dict[str, Any]:
        started = time.monotonic()
        self.skipped = Skipped(self.progress, records.read(self.folder, SKIPPED))
        self.restore()
        assert self._restored is not None
        (done, seconds), self._restored = self._restored, None
        steps = self.recipe.run.steps
        if done == steps and len(self.idle) >= IDLE_STEPS:
            raise RunError(_ended(done, self.idle))
        if done == steps:
            self.progress.note(f"all {steps} steps of this run are done; measuring again")
        elif self.held_out and not self.recipe.measure.path and self.recipe.data.path != "tiny":
            self.progress.note("before and after are measured on rows that are trained on too; --set measure.path=FILE names held-out ones")
        rows, prompts = len(self.examples), self.recipe.rollout.prompts
        if rows < prompts and done < steps:
            self.progress.note(f"{_plural(rows, 'row')} for rollout.prompts = {prompts}: rows stand in a step more than once")
        before = self._before(done)
        self.progress.begin("train", steps, done)
        for step, batch in enumerate(ahead(self._encode, range(done + 1, steps + 1)), done + 1):
            if self._lacks_prompts(batch):
                if not self._any_usable():
                    few = len(self.examples) > preflight.SAMPLE
                    none = f"none of {preflight.SAMPLE} rows spread over the data" if few else "none in the data"
                    why = f"step {step}: {NO_PROMPT}, and {none} ({self.skipped.why()})"
                    self._end(step - 1, seconds + time.monotonic() - started, why)
                batch = Batch((), batch.reasons)
            metrics, samples = self.step(step, batch)
            if self.backend.rank == 0:
                self.folder.append("metrics.jsonl", metrics)
                for sample in samples:
                    self.folder.append("rollouts.jsonl", sample)
            self.progress.step(metrics)
            self.progress.advance(1)
            self._count(metrics.get("not_taken"), step)
            self._keep_skipped()
            if len(self.idle) >= IDLE_STEPS:
                self._end(step, seconds + time.monotonic() - started, _ended(step, self.idle))
            self._follow(step, before)
            every = self.recipe.run.checkpoint_every
            due = self.progress.stopping or step == steps or (every and step % every == 0)
            if due and self.taken:  # before the first step that is taken there is nothing to save
                self._checkpoint(step, seconds + time.monotonic() - started)
            if self.progress.stopping:
                raise Stopped(f"stopped after step {step}; go on with: opd train --resume {self.folder.path}")
        if not self.taken:
            raise RunError(f"{_ended(steps, self.idle)}; no step was taken, so there is no trained model to write")
        if self.backend.rank == 0:
            self.folder.fill(self.folder.path / self.recipe.model.result, self._export)
        after = self._measure("after", before)
        self._keep("after", after)
        self._record(steps, after)
        self._keep_skipped()
        return self._summary(before, after, seconds + time.monotonic() - started)

    def step(self, step: int, batch: Batch) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One optimizer step of Vision-OPD; its metrics, and the completions that go to rollouts.jsonl."""
        recipe, backend = self.recipe, self.backend
        objective = recipe.objective.objective(recipe.rollout.temperature)
        clock = _Clock()

        # 1. The student samples completions on the full image.
        sampling = Sampling(recipe.rollout.temperature, self.encoder.stop, self.encoder.banned)
        places = [pair.place for pair in batch.pairs]
        uniforms = randomness.uniforms(recipe.run.seed, step, places, recipe.rollout.completions, recipe.rollout.max_tokens)
        room = recipe.rollout.sample_tokens
        sampled = rollout.sample(backend, [pair.student for pair in batch.pairs], uniforms, sampling, room)
        kept = rollout.keep(batch.pairs, sampled, self.encoder.banned)
        clock.lap("rollout")

        # 2. Student (full image) and teacher (crop) are read along them; the divergence's gradient goes through the student.
        completions = [completion for group in kept.completions for completion in group]
        counts = [
            sum(map(len, completions)),
            len(completions),
            sum(not completion.finished for completion in completions),
            kept.dropped,
            batch.skipped,
            kept.empty,
            sum(pair.weight > 0 for pair in kept.pairs),
        ]
        tokens, *rest, empty, weighted = (int(count) for count in backend.total(np.array(counts, np.float64)))
        groups = rollout.groups(kept, tokens) if weighted else []
        statistics: list[list[TokenStatistics]] = [[] for _ in groups]
        budget = recipe.rollout.microbatch_tokens
        cut = rollout.cut(groups, budget)
        padding = rollout.most(backend, len(cut)) - len(cut)  # every process makes the same number of calls
        for part in cut:
            together = [groups[index] for index in part]
            rows = backend.accumulate(together, objective, rollout.split(together, budget))
            for index, its in zip(part, rows, strict=True):
                statistics[index] = its
        for _ in range(padding):
            backend.accumulate([rollout.spare(batch.pairs[0], self.encoder.stop)], objective)
        clock.lap("accumulate")

        # 3. One optimizer step, then the teacher moves towards the student.
        update = schedules.update(recipe.optimizer, step, recipe.run.steps)
        means = _means(groups, statistics, tokens, backend)
        result = backend.apply(update) if weighted else None
        taken = result is not None and result.taken
        if result is not None:
            why = GRADIENT if np.isfinite(means["logprob_gap"]) else OUTPUTS
        else:
            why = WEIGHTS if tokens else _all_dropped(rest[2], empty) if rest[2] else NO_PROMPT
        rate = schedules.teacher_rate(recipe.teacher, step) if taken else 0.0
        if rate:
            backend.move_teacher(rate)
        clock.lap("apply")

        every = recipe.run.rollouts_every
        samples = self._samples(step, kept, statistics[0]) if groups and every and (step - 1) % every == 0 else []
        metrics = {
            "step": step,
            **means,
            "gradient_norm": result.gradient_norm if result else 0.0,
            "taken": taken,
            **({} if taken else {"not_taken": why}),
            "learning_rate": update.learning_rate,
            "teacher_rate": rate,
            "tokens": tokens,
            **dict(zip(("completions", "truncated", "dropped", "skipped"), rest, strict=True)),
            **clock.seconds,
            "tokens_per_second": tokens / max(1e-9, sum(clock.seconds.values())),
            "peak_memory_bytes": backend.peak_memory,
        }
        return metrics, samples

    def _encode(self, step: int) -> Batch:
        """This process's share of a step's examples, encoded. A row that cannot be read, or is too long, is skipped and counted."""
        recipe = self.recipe
        indices = randomness.batch(recipe.run.seed, step, recipe.rollout.prompts, len(self.examples))
        mine = range(self.backend.rank, len(indices), self.backend.size)
        pairs: list[Pair] = []
        reasons: list[str] = []
        for place in mine:
            example = replace(self.examples[int(indices[place])], answer=None)  # the method has no labels; choices are part of the question
            try:
                prompts = usable.encode(self.encoder, example, recipe.view, recipe.data.max_prompt_tokens)
            except Unusable as error:
                self.skipped.add(example, error)
                reasons.append(error.kind)
                continue
            pairs.append(Pair(place, example.id, example.weight, *prompts))
        return Batch(tuple(pairs), tuple(reasons))

    def _lacks_prompts(self, batch: Batch) -> bool:
        """Whether a process has no usable prompt in a step; the same on every process."""
        return bool(self.backend.total(np.array([float(not batch.pairs)]))[0])

    def _any_usable(self) -> bool:
        """Whether some row of the data can be used, of a sample where the data are large; those that cannot are counted."""
        count = min(len(self.examples), preflight.SAMPLE)
        for index in range(count):
            example = replace(self.examples[index * len(self.examples) // count], answer=None)
            try:
                usable.encode(self.encoder, example, self.recipe.view, self.recipe.data.max_prompt_tokens)
            except Unusable as error:
                self.skipped.add(example, error)
                continue
            return True
        return False

    def _count(self, not_taken: str | None, step: int) -> None:
        """Counts a step that was taken, or tells why it was not."""
        if not_taken is None:
            self.taken, self.idle = self.taken + 1, []
            return
        self.idle.append(not_taken)
        self.progress.note(f"step {step}: {not_taken}, so the step was not taken")

    def _end(self, done: int, seconds: float, why: str) -> None:
        """Ends the run after step `done`, which is saved where anything was learnt. Raises RunError."""
        self._keep_skipped()
        saved = self.folder.checkpoints()
        if self.taken and (not saved or saved[-1][0] < done):
            self._checkpoint(done, seconds)
        raise RunError(why)

    def _samples(self, step: int, kept: rollout.Rollout, statistics: Sequence[TokenStatistics]) -> list[dict[str, Any]]:
        """The first group's completions with their per-token statistics."""
        return [
            {
                "step": step,
                "id": kept.pairs[0].id,
                "text": self.encoder.decode(completion.tokens.tolist()),
                "finished": completion.finished,
                "tokens": completion.tokens.tolist(),
                "sampler_logprobs": _rounded(completion.logprobs),
                **{name: _rounded(values) for name, values in asdict(row).items() if values is not None},
            }
            for completion, row in zip(kept.completions[0], statistics, strict=True)
        ]

    def _before(self, done: int) -> list[measure.Answered]:
        """The answers before training: a resumed run reads the ones that were kept."""
        if kept := records.before(self.folder):
            return kept
        if done and self.held_out:
            self.progress.note(f"no answers of before training are kept: what is called before is measured after step {done}")
        answered = self._measure("before")
        self._keep("before", answered)
        self._record(0, answered)
        return answered

    def _follow(self, step: int, before: Sequence[measure.Answered]) -> None:
        """Measures between steps, where the recipe asks for it."""
        every, steps = self.recipe.measure.every, self.recipe.run.steps
        if every and step % every == 0 and step < steps:
            self._record(step, self._measure("measure", before))
            self.progress.begin("train", steps, step)

    def _measure(self, phase: str, before: Sequence[measure.Answered] | None = None) -> list[measure.Answered]:
        """The student's answers to the held-out examples, now; only to those that were answered `before`, where that is given."""
        if not self.held_out or (before is not None and not before):
            return []
        self.progress.begin(phase, 2 * len(self.held_out))
        options, budget = self.recipe.measure, self.recipe.rollout.sample_tokens
        answered = measure.answer(
            self.backend,
            self.encoder,
            self.held_out,
            self.recipe.view,
            options.max_tokens,
            budget,
            self.progress.advance,
            self.recipe.data.max_prompt_tokens,
            self.skipped,
        )
        rows = {one.row for one in before} if before is not None else set(range(len(self.held_out)))
        answered = [one for one in answered if one.row in rows]
        if missing := len(rows) - len(answered):
            which = "measured before" if before is not None else "to be measured"
            left = "they are left out of every comparison" if answered else "nothing is measured"
            self.progress.note(f"{missing} of {usable.rows(len(rows))} {which} cannot be used; {left}")
        return answered

    def _keep_skipped(self) -> None:
        """Every row that could not be used and its reason, to skipped.jsonl."""
        for record in self.skipped.new():
            if self.backend.rank == 0:
                self.folder.append(SKIPPED, record)

    def _keep(self, when: str, answered: Sequence[measure.Answered]) -> None:
        """Every answer before or after, to answers.jsonl."""
        if answered and self.backend.rank == 0:
            others = [row for row in records.read(self.folder, "answers.jsonl") if row["when"] != when]
            self.folder.rewrite("answers.jsonl", [*others, *({"when": when, **asdict(one)} for one in answered)])

    def _record(self, step: int, answered: Sequence[measure.Answered]) -> None:
        """Accuracies and their intervals at a step, to accuracy.jsonl: the gap as it closes."""
        if answered and self.backend.rank == 0:
            earlier = [row for row in records.read(self.folder, "accuracy.jsonl") if row["step"] < step]
            self.folder.rewrite("accuracy.jsonl", [*earlier, {"step": step, **measure.accuracies(answered)}])

    def _export(self, folder: Path) -> None:
        self.backend.export(folder, self.recipe.model.result)
        self.encoder.save(folder)
        leave(self.recipe, folder, self.recipe.run.steps)

    def _checkpoint(self, step: int, seconds: float) -> None:
        def fill(folder: Path) -> None:
            self.backend.save(folder)
            state = {"step": step, "seconds": seconds, "taken": self.taken, "idle": self.idle}
            RunFolder(folder).write(STATE, state)

        if self.backend.rank == 0:
            self.folder.checkpoint(step, self.recipe.run.keep, fill)

    def _restore(self) -> tuple[int, float]:
        """Loads the last checkpoint and drops the records of later steps; (steps done, seconds so far), (0, 0) without one."""
        checkpoints = self.folder.checkpoints()
        if not checkpoints:
            done, seconds = 0, 0.0
        else:
            done, path = checkpoints[-1]
            earlier = f"go on from step {checkpoints[-2][0]}" if len(checkpoints) > 1 else "start again"
            try:
                self.backend.load(path)
                state = RunFolder(path).read(STATE)
                seconds, self.taken, self.idle = float(state["seconds"]), int(state["taken"]), list(state["idle"])
            except (OSError, ValueError, KeyError, TypeError, FolderError) as error:
                raise FolderError(f"checkpoint '{path}' is damaged: {error}; remove it to {earlier}") from error
            if done < self.recipe.run.steps:
                self.progress.note(f"going on after step {done} of {self.recipe.run.steps}")
        if self.backend.rank == 0:
            for name in ("metrics.jsonl", "rollouts.jsonl", "accuracy.jsonl"):
                rows = records.read(self.folder, name)
                self.folder.rewrite(name, [row for row in rows if row["step"] <= done])
            if (self.folder.path / SKIPPED).exists():  # a row behind a half-written one would be on its line
                self.folder.rewrite(SKIPPED, records.read(self.folder, SKIPPED))
        return done, seconds

    def _summary(self, before: Sequence[measure.Answered], after: Sequence[measure.Answered], seconds: float) -> dict[str, Any]:
        rows = records.read(self.folder, "metrics.jsonl")
        before, after = measure.paired(before, after)
        summary = {
            "backend": self.name,
            "device": self.backend.device,
            "steps": self.recipe.run.steps,
            "seed": self.recipe.run.seed,
            "seconds": round(seconds, 1),
            "examples": len(after),
            "steps_not_finite": sum(row.get("not_taken") in (GRADIENT, OUTPUTS) for row in rows),
            "steps_not_taken": sum(not row["taken"] for row in rows),
            "completions": sum(row["completions"] for row in rows),
            **{f"completions_{what}": sum(row[what] for row in rows) for what in ("dropped", "truncated")},
            "rows_skipped": len(getattr(self.examples, "skipped", ())),
            "prompts_skipped": sum(row["skipped"] for row in rows),
            "rows_unusable": len(self.skipped.reasons),
            "rows_not_measured": len(self.held_out) - len(after),
            "verdict": None,
        }
        if after:
            compared = {**measure.gap_closed(before, after), **measure.changes(before, after)}
            summary |= {"before": measure.accuracies(before), "after": measure.accuracies(after), **compared}
        if self.backend.rank == 0:
            self.folder.write("summary.json", summary)
        if fell := summary["prompts_skipped"]:
            drawn = self.recipe.run.steps * self.recipe.rollout.prompts
            names = self.folder.path / SKIPPED
            self.progress.note(
                f"{fell:,} of {drawn:,} prompts ({fell / drawn:.1%}) could not be used: {self.skipped.why()}; named in {names}"
            )
        return summary


class _Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[f"seconds_{name}"] = now - self._last
        self._last = now


def _means(groups: Sequence[Group], statistics: Sequence[Sequence[TokenStatistics]], tokens: int, backend: Backend) -> dict[str, float]:
    """The step's loss, and means over all its tokens on all processes."""
    sums = np.zeros(6)
    for group, rows in zip(groups, statistics, strict=True):
        for weight, row in zip(group.weights, rows, strict=True):
            terms = (weight * row.ratio * row.divergence, row.divergence, row.ratio, row.student_entropy, row.teacher_entropy)
            sums += [*(term.sum(dtype=np.float64) for term in terms), float(np.abs(row.student_logprobs - row.teacher_logprobs).sum())]
    sums = backend.total(sums)
    sums[1:] /= max(1, tokens)
    names = ("loss", "divergence", "ratio", "student_entropy", "teacher_entropy", "logprob_gap")
    return dict(zip(names, (float(value) for value in sums), strict=True))


def _plural(count: int, thing: str) -> str:
    return f"{count} {thing}" + ("" if count == 1 else "s")


def _all_dropped(dropped: int, empty: int) -> str:
    """Why nothing is left of a step's completions."""
    return EMPTY if empty == dropped else BANNED if not empty else "every completion was empty or held a banned token"


def _ended(step: int, idle: Sequence[str]) -> str:
    """Why the last steps up to `step` were not taken, and what to do."""
    ((most, _), *others) = Counter(idle).most_common()
    steps = f"step {step} was" if len(idle) == 1 else f"steps {step - len(idle) + 1} to {step} were"
    advice = f"; {ADVICE[most]}" if most in ADVICE else ""
    return f"{steps} not taken: {most}{', most often' if others else ''}{advice}"


def _rounded(values: NDArray[np.float32]) -> list[float]:
    return [round(float(value), 5) for value in values]
