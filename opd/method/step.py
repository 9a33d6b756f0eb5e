"""One training step of Vision-OPD.

The student samples completions on the full image. Student (full image) and teacher (evidence) score
them, and the divergence between the two is differentiated through the student. The optimizer steps,
and the teacher moves towards the student.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from opd import randomness
from opd.backend import Backend
from opd.method import microbatch, rollout, schedules
from opd.method.rollout import Pair, Rollout, RolloutOptions
from opd.method.schedules import OptimizerOptions, TeacherOptions
from opd.objective import ObjectiveOptions
from opd.types import Group, Sampling, TokenStatistics

GRADIENT = "the gradient was not finite"
OUTPUTS = "the model's log-probabilities were not finite"
WEIGHTS = "every row had weight 0"
NO_PROMPT = "no prompt of the step can be used"
EMPTY = "every completion was empty"
BANNED = "every completion held a banned token"
EMPTY_OR_BANNED = "every completion was empty or held a banned token"


@dataclass(frozen=True)
class Method:
    """The settings of the method: four sections of a recipe, `seed`, number of `steps`, and the
    token ids that end a completion (`stop`) or never appear in one (`banned`)."""

    rollout: RolloutOptions
    objective: ObjectiveOptions
    teacher: TeacherOptions
    optimizer: OptimizerOptions
    seed: int
    steps: int
    stop: tuple[int, ...]
    banned: tuple[int, ...]

    def with_half_the_budgets(self) -> Method | None:
        """The same method with half the budgets of tokens; None if both would be below one
        completion."""
        options = self.rollout
        microbatch_tokens = options.microbatch_tokens // 2
        sample_tokens = options.sample_tokens // 2
        if max(microbatch_tokens, sample_tokens) < options.max_tokens:
            return None
        halved = {
            "microbatch_tokens": max(1, microbatch_tokens),
            "sample_tokens": max(1, sample_tokens),
        }
        return replace(self, rollout=options.model_copy(update=halved))


@dataclass(frozen=True)
class Batch:
    """The encoded examples of a step on this process; `skipped` counts this process's rows that
    could not be used."""

    pairs: tuple[Pair, ...]
    skipped: int = 0


@dataclass(frozen=True)
class StepResult:
    """The result of a step: `metrics` over all processes, and the rollout of this process with
    `statistics` for each completion of each group."""

    metrics: dict[str, Any]
    rollout: Rollout
    statistics: tuple[tuple[TokenStatistics, ...], ...]


def train_step(step: int, batch: Batch, method: Method, backend: Backend) -> StepResult:
    """Takes step `step` (1, 2, ...) of a run.

    If it raises OutOfMemory, the same step can be retried, also with smaller budgets, which do not
    change the result. If the batch has nothing to learn from, or gradient or log-probabilities are
    not finite, the step is not taken: neither policy changes, and the metric `not_taken` is the
    reason.
    """
    options = method.rollout
    objective = method.objective.objective(options.temperature)
    clock = Clock()

    # 1. The student samples completions on the full image.
    places = [pair.place for pair in batch.pairs]
    uniforms = randomness.uniforms(
        method.seed, step, places, options.completions, options.max_tokens
    )
    sampling = Sampling(options.temperature, method.stop, method.banned)
    prompts = [pair.student for pair in batch.pairs]
    prefill = rollout.prefill_of(backend, prompts, options)
    sampled = rollout.sample(
        backend, prompts, uniforms, sampling, options.sample_tokens, prefill=prefill
    )
    kept = rollout.drop_unusable(batch.pairs, sampled, method.banned)
    clock.lap("rollout")

    # 2. Both policies score them; the gradient of the divergence goes through the student.
    counts = _counts(kept, batch, backend)
    groups = rollout.groups(kept, counts["tokens"]) if counts["weighted"] else []
    padding = rollout.padding_group(batch.pairs[0], method.stop) if batch.pairs else None
    statistics = microbatch.accumulate(
        backend, groups, objective, options.microbatch_tokens, padding, prefill
    )
    clock.lap("accumulate")

    # 3. The optimizer steps, then the teacher moves towards the student.
    update = schedules.optimizer_update(method.optimizer, step, method.steps)
    means = _means(groups, statistics, counts["tokens"], backend)
    result = backend.apply(update) if counts["weighted"] else None
    taken = result is not None and result.taken
    rate = schedules.teacher_rate(method.teacher, step) if taken else 0.0
    if rate:
        backend.move_teacher(rate)
    clock.lap("apply")

    fault = GRADIENT if np.isfinite(means["logprob_gap"]) else OUTPUTS
    why = fault if result else _nothing_to_learn(counts)
    metrics = {
        "step": step,
        **means,
        "gradient_norm": result.gradient_norm if result else 0.0,
        "taken": taken,
        **({} if taken else {"not_taken": why}),
        "learning_rate": update.learning_rate,
        "teacher_rate": rate,
        **{
            name: counts[name]
            for name in ("tokens", "completions", "truncated", "dropped", "skipped")
        },
        **clock.seconds,
        "tokens_per_second": counts["tokens"] / max(1e-9, sum(clock.seconds.values())),
        "peak_memory_bytes": backend.peak_memory,
    }
    return StepResult(metrics, kept, tuple(map(tuple, statistics)))


@dataclass
class Clock:
    """Measures the seconds of each part of a step, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)

    def lap(self, name: str) -> None:
        """Ends the part `name`; the next part begins."""
        now = time.monotonic()
        self.seconds[f"seconds_{name}"] = now - self._last
        self._last = now


def _counts(kept: Rollout, batch: Batch, backend: Backend) -> dict[str, int]:
    """Counts of the rollout over all processes; `weighted` counts examples with a weight above
    0."""
    completions = [completion for group in kept.completions for completion in group]
    counts = {
        "tokens": sum(map(len, completions)),
        "completions": len(completions),
        "truncated": sum(not completion.finished for completion in completions),
        "dropped": kept.dropped,
        "skipped": batch.skipped,
        "empty": kept.empty,
        "weighted": sum(pair.weight > 0 for pair in kept.pairs),
    }
    totals = backend.total(np.array(list(counts.values()), np.float64))
    return {name: int(total) for name, total in zip(counts, totals, strict=True)}


def _means(
    groups: Sequence[Group],
    statistics: Sequence[Sequence[TokenStatistics]],
    tokens: int,
    backend: Backend,
) -> dict[str, float]:
    """The loss of the step, and means of statistics over the step's `tokens`, over all
    processes."""
    sums = np.zeros(6)
    for group, rows in zip(groups, statistics, strict=True):
        for weight, row in zip(group.weights, rows, strict=True):
            terms = (
                weight * row.ratio * row.divergence,
                row.divergence,
                row.ratio,
                row.student_entropy,
                row.teacher_entropy,
            )
            gap = float(np.abs(row.student_logprobs - row.teacher_logprobs).sum())
            sums += [*(term.sum(dtype=np.float64) for term in terms), gap]
    sums = backend.total(sums)
    sums[1:] /= max(1, tokens)
    names = ("loss", "divergence", "ratio", "student_entropy", "teacher_entropy", "logprob_gap")
    return dict(zip(names, map(float, sums), strict=True))


def _nothing_to_learn(counts: dict[str, int]) -> str:
    """The reason why the step's completions have nothing to learn from."""
    if counts["tokens"]:
        return WEIGHTS
    if not counts["dropped"]:
        return NO_PROMPT
    if counts["empty"] == counts["dropped"]:
        return EMPTY
    return EMPTY_OR_BANNED if counts["empty"] else BANNED
