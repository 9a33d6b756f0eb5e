"""The rollout: what the student samples, what of it is dropped, and the weights of a step's tokens.

Legend: B prompts of a step, n completions of each, T tokens of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from opd.backend import Backend, Prefill
from opd.errors import RunError
from opd.method.microbatch import largest_count, microbatches
from opd.options import Options
from opd.types import Completion, FloatArray, Group, Prompt, Sampling

NOT_FINITE = (
    "the model's log-probabilities are not finite (NaN or infinite), so it cannot answer: look for"
    " NaN in its weights, lower optimizer.learning_rate where they were trained, or set"
    " model.dtype=float32"
)


class RolloutOptions(Options):
    """What the student samples in a step."""

    prompts: int = Field(96, ge=1, description="Prompts of one optimizer step.")
    completions: int = Field(8, ge=1, description="Completions sampled of each prompt.")
    max_tokens: int = Field(1024, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(
        1.0,
        gt=0,
        le=10,
        description="Sampling temperature; the objective reads both policies at it.",
    )
    microbatch_tokens: int = Field(
        16384,
        ge=1,
        description=(
            "Padded tokens that are differentiated together; of a longer group, fewer completions"
            " at a time. Changes no result."
        ),
    )
    sample_tokens: int = Field(
        65536,
        ge=1,
        description=(
            "Padded tokens that are sampled together, where only keys and values are held. Changes"
            " no result."
        ),
    )


@dataclass(frozen=True)
class Pair:
    """One example as the two policies see it: student prompt, teacher prompt, and what training
    needs to know of the example.

    `place`: index of the example in the step's whole batch, over all processes.
    """

    place: int
    id: str
    weight: float
    student: Prompt
    teacher: Prompt


@dataclass(frozen=True)
class Rollout:
    """The pairs that have something to learn from, their completions, and how many were dropped;
    `empty` of those had no token."""

    pairs: tuple[Pair, ...]
    completions: tuple[tuple[Completion, ...], ...]
    dropped: int
    empty: int = 0


def sample(
    backend: Backend,
    prompts: Sequence[Prompt],
    uniforms: FloatArray,
    sampling: Sampling,
    budget: int,
    progress: Callable[[int], None] = lambda prompts: None,
    prefill: Prefill | None = None,
) -> list[list[Completion]]:
    """The student samples n completions of all prompts in micro-batches; results are in the order
    of the prompts.

    `uniforms` [B, n, max_tokens]; `budget` in padded tokens; `progress` hears the number of prompts
    that each micro-batch finished; `prefill` is of all prompts, see `prefill_of`.
    Raises RunError where the model's log-probabilities are not finite: nothing that is drawn from
    them means anything.
    """
    _, completions, max_tokens = uniforms.shape
    result: list[list[Completion]] = [[] for _ in prompts]
    parts = parts_of(prompts, completions, max_tokens, budget)
    # every process makes the same number of calls
    parts += [[0]] * (largest_count(backend, len(parts)) - len(parts))
    for part in parts:
        together = [prompts[index] for index in part]
        sampled = backend.sample(together, uniforms[part], sampling, prefill=prefill)
        for index, group in zip(part, sampled, strict=True):
            if not all(np.isfinite(completion.logprobs).all() for completion in group):
                raise RunError(NOT_FINITE)
            result[index] = group
        progress(len(part))
    return result


def parts_of(
    prompts: Sequence[Prompt], completions: int, max_tokens: int, budget: int
) -> list[list[int]]:
    """Which prompts are sampled together: `budget` in padded tokens, every completion as long as it
    may be."""
    return microbatches([(len(prompt), max_tokens) for prompt in prompts], completions, budget)


def prefill_of(
    backend: Backend, prompts: Sequence[Prompt], options: RolloutOptions
) -> Prefill | None:
    """One pass of the student over a step's prompts for both rollout and gradient; None where they
    are not sampled together, cannot be differentiated together, or where the backend says that it
    does not serve."""
    parts = parts_of(prompts, options.completions, options.max_tokens, options.sample_tokens)
    fewest = parts_of(prompts, options.completions, 1, options.microbatch_tokens)
    if len(parts) != 1 or len(fewest) != 1:
        return None
    return backend.prefill([prompts[index] for index in parts[0]])


def cut_at_stop(
    tokens: NDArray[np.integer], logprobs: FloatArray, n: int, stop: Sequence[int]
) -> list[list[Completion]]:
    """Cuts what ran in lockstep, tokens and log-probabilities [B * n, steps], behind each row's
    first stop token: n completions of each prompt, finished where there is one."""
    stopped = np.isin(tokens, stop)
    finished = np.atleast_1d(stopped.any(1))
    lengths = np.where(finished, stopped.argmax(1) + 1, tokens.shape[1])
    rows = [
        Completion(row[:length].astype(np.int32), values[:length].copy(), bool(found))
        for row, values, length, found in zip(tokens, logprobs, lengths, finished, strict=True)
    ]
    return [rows[start : start + n] for start in range(0, len(rows), n)]


def drop_unusable(
    pairs: Sequence[Pair], sampled: Sequence[Sequence[Completion]], banned: Sequence[int]
) -> Rollout:
    """Drops empty completions and such that hold a banned token, and pairs with nothing left; they
    are counted, never fatal."""
    kept = [
        tuple(completion for completion in group if _usable(completion, banned))
        for group in sampled
    ]
    dropped = sum(len(group) for group in sampled) - sum(len(group) for group in kept)
    empty = sum(not len(completion) for group in sampled for completion in group)
    left = [index for index, group in enumerate(kept) if group]
    return Rollout(
        tuple(pairs[index] for index in left), tuple(kept[index] for index in left), dropped, empty
    )


def groups(rollout: Rollout, step_tokens: int) -> list[Group]:
    """Groups whose weights make their sum the mean over all `step_tokens` tokens of the step, over
    all processes.

    A token's weight is its example's weight / step_tokens, so micro-batches and processes cannot
    change the result.
    """
    return [
        Group(
            pair.student,
            pair.teacher,
            completions,
            tuple(
                np.full(len(completion), pair.weight / max(1, step_tokens), np.float32)
                for completion in completions
            ),
        )
        for pair, completions in zip(rollout.pairs, rollout.completions, strict=True)
    ]


def padding_group(pair: Pair, stop: Sequence[int]) -> Group:
    """A group of one stop token with weight 0: it costs a call and adds nothing. It pads the calls
    of a process that has fewer."""
    token = Completion(np.array(stop[:1], np.int32), np.zeros(1, np.float32), finished=True)
    return Group(pair.student, pair.teacher, (token,), (np.zeros(1, np.float32),))


def _usable(completion: Completion, banned: Sequence[int]) -> bool:
    return len(completion) > 0 and set(banned).isdisjoint(completion.tokens.tolist())
