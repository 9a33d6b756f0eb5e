"""The loop: measure, then roll out, differentiate, step, move the teacher and record, then measure again.

The whole method is `Trainer.step`. Nothing here knows a framework, and nothing reads an answer but measuring.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd import measure, randomness, rollout, schedules
from opd.ahead import ahead
from opd.backend import Backend
from opd.errors import DataError, FolderError, RunError, Stopped
from opd.folder import RunFolder
from opd.progress import Progress, Quiet
from opd.recipe import Recipe
from opd.rollout import Pair
from opd.types import Encoder, Example, Group, Sampling, TokenStatistics

STATE = "state.json"


@dataclass(frozen=True)
class Batch:
    """The encoded pairs of a step on this process, and how many examples could not be used."""

    pairs: tuple[Pair, ...]
    skipped: int


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

    def train(self) -> dict[str, Any]:
        """Trains from the last checkpoint, or from the start, and returns the summary.

        Raises Stopped when asked to, RunError where the run cannot go on; the folder then holds a checkpoint to resume from.
        """
        try:
            return self._train()
        finally:
            self.folder.release()

    def _train(self) -> dict[str, Any]:
        started = time.monotonic()
        done, seconds = self._restore()
        steps = self.recipe.run.steps
        if done == steps:
            self.progress.note(f"all {steps} steps of this run are done; measuring again")
        elif self.held_out and not self.recipe.measure.path and self.recipe.data.path != "tiny":
            self.progress.note("before and after are measured on rows that are trained on too; --set measure.path=FILE names held-out ones")
        rows, prompts = len(self.examples), self.recipe.rollout.prompts
        if rows < prompts and done < steps:
            self.progress.note(f"{_plural(rows, 'row')} for rollout.prompts = {prompts}: rows stand in a step more than once")
        before = self._before()
        self.progress.begin("train", steps, done)
        for step, batch in enumerate(ahead(self._encode, range(done + 1, steps + 1)), done + 1):
            metrics, samples = self.step(step, batch)
            if self.backend.rank == 0:
                self.folder.append("metrics.jsonl", metrics)
                for sample in samples:
                    self.folder.append("rollouts.jsonl", sample)
            self.progress.step(metrics)
            self.progress.advance(1)
            self._follow(step)
            every = self.recipe.run.checkpoint_every
            if self.progress.stopping or step == steps or (every and step % every == 0):
                self._checkpoint(step, seconds + time.monotonic() - started)
            if self.progress.stopping:
                raise Stopped(f"stopped after step {step}; go on with: opd train --resume {self.folder.path}")
        if self.backend.rank == 0:
            self.folder.fill(self.folder.path / self.recipe.model.result, self._export)
        after = self._measure("after")
        self._keep("after", after)
        self._record(steps, after)
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
        ]
        tokens, *rest = (int(count) for count in backend.total(np.array(counts, np.float64)))
        groups = rollout.groups(kept, tokens)
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
        result = backend.apply(update) if tokens else None
        taken = result is not None and result.taken
        rate = schedules.teacher_rate(recipe.teacher, step) if taken else 0.0
        if rate:
            backend.move_teacher(rate)
        clock.lap("apply")

        every = recipe.run.rollouts_every
        samples = self._samples(step, kept, statistics[0]) if groups and every and (step - 1) % every == 0 else []
        metrics = {
            "step": step,
            **_means(groups, statistics, tokens, backend),
            "gradient_norm": result.gradient_norm if result else 0.0,
            "taken": taken,
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
        pairs = [pair for pair in (self._pair(place, int(indices[place])) for place in mine) if pair is not None]
        if not pairs and self.backend.size > 1:
            raise RunError(
                f"step {step}: process {self.backend.rank} has no usable prompt; raise rollout.prompts or data.max_prompt_tokens"
            )
        return Batch(tuple(pairs), len(mine) - len(pairs))

    def _pair(self, place: int, index: int) -> Pair | None:
        example = replace(self.examples[index], answer=None)  # the method has no labels; choices are part of the question
        try:
            student = measure.encode_student(self.encoder, example)
            teacher = measure.encode_teacher(self.encoder, example, self.recipe.view)
        except DataError as error:
            self.progress.note(f"skipped {example.source or example.id}: {error}")
            return None
        limit = self.recipe.data.max_prompt_tokens
        if limit and max(len(student), len(teacher)) > limit:
            self.progress.note(f"skipped {example.source or example.id}: prompt of {max(len(student), len(teacher))} tokens, limit {limit}")
            return None
        return Pair(place, example.id, example.weight, student, teacher)

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

    def _before(self) -> list[measure.Answered]:
        """The answers before training: a resumed run reads the ones that were kept."""
        rows = [row for row in self.folder.rows("answers.jsonl") if row["when"] == "before"]
        if rows:
            return [measure.Answered(**{key: value for key, value in row.items() if key != "when"}) for row in rows]
        answered = self._measure("before")
        self._keep("before", answered)
        self._record(0, answered)
        return answered

    def _follow(self, step: int) -> None:
        """Measures between steps, where the recipe asks for it."""
        every, steps = self.recipe.measure.every, self.recipe.run.steps
        if every and step % every == 0 and step < steps:
            self._record(step, self._measure("measure"))
            self.progress.begin("train", steps, step)

    def _measure(self, phase: str) -> list[measure.Answered]:
        """The student's answers to the held-out examples, now."""
        if not self.held_out:
            return []
        self.progress.begin(phase, 2 * len(self.held_out))
        options, budget = self.recipe.measure, self.recipe.rollout.sample_tokens
        return measure.answer(
            self.backend, self.encoder, self.held_out, self.recipe.view, options.max_tokens, budget, progress=self.progress.advance
        )

    def _keep(self, when: str, answered: Sequence[measure.Answered]) -> None:
        """Every answer before or after, to answers.jsonl."""
        if answered and self.backend.rank == 0:
            others = [row for row in self.folder.rows("answers.jsonl") if row["when"] != when]
            self.folder.rewrite("answers.jsonl", [*others, *({"when": when, **asdict(one)} for one in answered)])

    def _record(self, step: int, answered: Sequence[measure.Answered]) -> None:
        """Accuracies and their intervals at a step, to accuracy.jsonl: the gap as it closes."""
        if answered and self.backend.rank == 0:
            earlier = [row for row in self.folder.rows("accuracy.jsonl") if row["step"] < step]
            self.folder.rewrite("accuracy.jsonl", [*earlier, {"step": step, **measure.accuracies(answered)}])

    def _export(self, folder: Path) -> None:
        self.backend.export(folder, self.recipe.model.result)
        self.encoder.save(folder)

    def _checkpoint(self, step: int, seconds: float) -> None:
        def fill(folder: Path) -> None:
            self.backend.save(folder)
            RunFolder(folder).write(STATE, {"step": step, "seconds": seconds})

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
                seconds = float(RunFolder(path).read(STATE)["seconds"])
            except (OSError, ValueError, KeyError, FolderError) as error:
                raise FolderError(f"checkpoint '{path}' is damaged: {error}; remove it to {earlier}") from error
            if done < self.recipe.run.steps:
                self.progress.note(f"going on after step {done} of {self.recipe.run.steps}")
        if self.backend.rank == 0:
            for name in ("metrics.jsonl", "rollouts.jsonl", "accuracy.jsonl"):
                rows = self.folder.rows(name)
                self.folder.rewrite(name, [row for row in rows if row["step"] <= done])
        return done, seconds

    def _summary(self, before: Sequence[measure.Answered], after: Sequence[measure.Answered], seconds: float) -> dict[str, Any]:
        rows = self.folder.rows("metrics.jsonl")
        summary = {
            "backend": self.name,
            "device": self.backend.device,
            "steps": self.recipe.run.steps,
            "seed": self.recipe.run.seed,
            "seconds": round(seconds, 1),
            "examples": len(after),
            "steps_not_finite": sum(not row["taken"] and row["tokens"] > 0 for row in rows),
            "completions": sum(row["completions"] for row in rows),
            **{f"completions_{what}": sum(row[what] for row in rows) for what in ("dropped", "truncated")},
            "rows_skipped": len(getattr(self.examples, "skipped", ())),
            "prompts_skipped": sum(row["skipped"] for row in rows),
        }
        if after:
            summary |= {"before": measure.accuracies(before), "after": measure.accuracies(after), **measure.gap_closed(before, after)}
        if self.backend.rank == 0:
            self.folder.write("summary.json", summary)
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


def _rounded(values: NDArray[np.float32]) -> list[float]:
    return [round(float(value), 5) for value in values]
