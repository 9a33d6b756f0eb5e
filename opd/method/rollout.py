"""The rollout: samples completions of the student, drops unusable ones, and computes the weights of
a step's tokens.

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
    """The completions that the student samples in a step."""

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
    """The prompts of one example for both policies, and the `weight` of the example in the loss.

    `place`: index of the example in the step's whole batch, over all processes. `id`: the example's
    id.
    """

    place: int
    id: str
    weight: float
    student: Prompt
    teacher: Prompt


@dataclass(frozen=True)
class Rollout:
    """The pairs with usable completions, and these `completions` for each pair. `dropped` counts
    unusable completions, of which `empty` had no token."""

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
    """Samples n completions of every prompt from the student, in micro-batches. Returns them in the
    order of the prompts.

    `uniforms` [B, n, max_tokens]. `budget`: padded tokens of a micro-batch. `progress` is called
    with the number of prompts that a micro-batch has finished. `prefill`: a result of `prefill_of`
    for all prompts.
    Raises RunError if log-probabilities are not finite, since the draws would be meaningless.
    """
    _, completions, max_tokens = uniforms.shape
    result: list[list[Completion]] = [[] for _ in prompts]
    parts = parts_of(prompts, completions, max_tokens, budget)
    # Every process has to make the same number of calls.
    parts += [[0]] * (largest_count(backend, len(parts)) - len(parts))
    for number, part in enumerate(parts):
        together = [prompts[index] for index in part]
        shared = prefill if number == 0 else None  # the other calls are there for other processes
        sampled = backend.sample(together, uniforms[part], sampling, prefill=shared)
        for index, group in zip(part, sampled, strict=True):
            if not all(np.isfinite(completion.logprobs).all() for completion in group):
                raise RunError(NOT_FINITE)
            result[index] = group
        progress(len(part))
    return result


def parts_of(
    prompts: Sequence[Prompt], completions: int, max_tokens: int, budget: int
) -> list[list[int]]:
    """Indices of the prompts in each micro-batch of the rollout, of at most `budget` padded tokens
    if all completions are as long as possible."""
    return microbatches([(len(prompt), max_tokens) for prompt in prompts], completions, budget)


def prefill_of(
    backend: Backend, prompts: Sequence[Prompt], options: RolloutOptions
) -> Prefill | None:
    """Runs the student once over a step's prompts, for both rollout and gradient. None if the
    prompts do not fit in one micro-batch of either, or if the backend does not support it."""
    parts = parts_of(prompts, options.completions, options.max_tokens, options.sample_tokens)
    fewest = parts_of(prompts, options.completions, 1, options.microbatch_tokens)
    if len(parts) != 1 or len(fewest) != 1:
        return None
    return backend.prefill([prompts[index] for index in parts[0]])


def cut_at_stop(
    tokens: NDArray[np.integer], logprobs: FloatArray, n: int, stop: Sequence[int]
) -> list[list[Completion]]:
    """Cuts each row of `tokens` and `logprobs` [B * n, steps] after the first stop token. Returns n
    completions of each prompt; a completion is finished if it has a stop token."""
    stopped = np.isin(tokens, stop)
    finished = np.atleast_1d(stopped.any(1))
    lengths = np.where(finished, stopped.argmax(1) + 1, tokens.shape[1])
    rows = [
        Completion(
            tokens[row, :length].astype(np.int32),
            logprobs[row, :length].copy(),
            bool(finished[row]),
        )
        for row, length in enumerate(lengths)
    ]
    return [rows[start : start + n] for start in range(0, len(rows), n)]


def drop_unusable(
    pairs: Sequence[Pair], sampled: Sequence[Sequence[Completion]], banned: Sequence[int]
) -> Rollout:
    """Drops completions that are empty or hold a banned token, and pairs without any completion
    left. The rollout counts them."""
    left: list[Pair] = []
    completions: list[tuple[Completion, ...]] = []
    dropped = empty = 0
    for pair, group in zip(pairs, sampled, strict=True):
        usable = tuple(completion for completion in group if _usable(completion, banned))
        dropped += len(group) - len(usable)
        empty += sum(not len(completion) for completion in group)
        if usable:
            left.append(pair)
            completions.append(usable)
    return Rollout(tuple(left), tuple(completions), dropped, empty)


def groups(rollout: Rollout, step_tokens: int) -> list[Group]:
    """The groups of a rollout. The weight of a token is the weight of the example / `step_tokens`,
    the tokens of the step over all processes.

    So the loss is a mean over all tokens, and does not depend on micro-batches and processes.
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
    """A group of one stop token with weight 0, which adds nothing to the gradient. A process that
    would make fewer calls than others runs it."""
    token = Completion(np.array(stop[:1], np.int32), np.zeros(1, np.float32), finished=True)
    return Group(pair.student, pair.teacher, (token,), (np.zeros(1, np.float32),))


def _usable(completion: Completion, banned: Sequence[int]) -> bool:
    """Whether a completion has tokens, and none of them is banned."""
    return len(completion) > 0 and set(banned).isdisjoint(completion.tokens.tolist())
