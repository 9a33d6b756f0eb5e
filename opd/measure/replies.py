"""Lets the student answer examples greedily, each on one or several pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

import numpy as np

from opd.backend import Backend
from opd.method.rollout import sample
from opd.prefetch import prefetch
from opd.types import Completion, Encoder, Example, Prompt, Sampling
from opd.views.usable import Skipped, Unusable

SLICE = 64
"""Largest number of examples in a slice, which is encoded and answered at once."""

SLICE_BYTES = 2**28
"""Largest number of bytes in the image arrays of a slice, unless one example alone has more. Two
slices are in memory: the next is encoded while one is answered."""

Prompts: TypeAlias = Mapping[str, Prompt]
"""Prompts of one example, by the name of what they show."""


@dataclass(frozen=True)
class Reply:
    """A greedy answer. `certainty`: the mean log-probability of its tokens, in nats, the one that
    ends it included. `prompt_tokens`: length of the prompt."""

    text: str
    certainty: float
    prompt_tokens: int


@dataclass(frozen=True)
class Slice:
    """Examples that are answered together: their indices `rows`, and the `prompts` of each.
    `passed` counts all examples up to here, usable or not."""

    rows: tuple[int, ...]
    prompts: tuple[Prompts, ...]
    passed: int


def replies(
    backend: Backend,
    encoder: Encoder,
    examples: Sequence[Example],
    names: Sequence[str],
    prompts_of: Callable[[Example], Prompts],
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None],
    skipped: Skipped,
    slice_size: int = SLICE,
    slice_bytes: int = SLICE_BYTES,
) -> Iterator[tuple[int, dict[str, Reply]]]:
    """Yields the index of every usable example with a reply to each of its prompts.

    `prompts_of` encodes an example, under some or all of the `names`; examples for which it raises
    Unusable are added to `skipped`. `max_tokens`: longest answer. `budget`: padded tokens that are
    sampled at once. `progress` is called with the number of prompts that are newly done, of
    len(names) for each example. `slice_size`, `slice_bytes`: most examples and bytes of image
    arrays that are encoded together.
    """
    slices = _slices(examples, prompts_of, skipped, slice_size, slice_bytes)
    passed = 0
    for part in prefetch(lambda number: next(slices, None), count()):
        if part is None:
            break
        # All at once, since a token step takes little longer for twice the rows.
        places = [
            (name, place)
            for name in names
            for place, prompts in enumerate(part.prompts)
            if name in prompts
        ]
        asked = [part.prompts[place][name] for name, place in places]
        answers: list[dict[str, Reply]] = [{} for _ in part.rows]
        if asked:
            completions = _greedy(backend, encoder, asked, max_tokens, budget, progress)
            for (name, place), prompt, completion in zip(places, asked, completions, strict=True):
                answers[place][name] = _reply(encoder, prompt, completion)
        progress(len(names) * (part.passed - passed) - len(asked))
        passed = part.passed
        yield from zip(part.rows, answers, strict=True)


def _slices(
    examples: Sequence[Example],
    prompts_of: Callable[[Example], Prompts],
    skipped: Skipped,
    most_examples: int,
    most_bytes: int,
) -> Iterator[Slice]:
    """Yields the usable examples with their prompts, in slices of at most `most_examples` and
    `most_bytes`, unless one example alone has more."""
    rows: list[int] = []
    all_prompts: list[Prompts] = []
    slice_bytes = 0
    for row in range(len(examples)):
        try:
            prompts = prompts_of(examples[row])
        except Unusable as error:
            skipped.add(examples[row], error)
            continue
        size = sum(map(_bytes, prompts.values()))
        if rows and (len(rows) == most_examples or slice_bytes + size > most_bytes):
            yield Slice(tuple(rows), tuple(all_prompts), row)
            rows, all_prompts, slice_bytes = [], [], 0
        rows.append(row)
        all_prompts.append(prompts)
        slice_bytes += size
    yield Slice(tuple(rows), tuple(all_prompts), len(examples))


def _bytes(prompt: Prompt) -> int:
    """Bytes of a prompt's image arrays; the other arrays are shared between prompts, and small."""
    return sum(array.nbytes for array in prompt.images.values())


def _greedy(
    backend: Backend,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None],
) -> list[Completion]:
    """The greedy completion of each prompt."""
    unused = np.zeros((len(prompts), 1, max_tokens), np.float32)  # greedy decoding draws nothing
    sampling = Sampling(0.0, encoder.stop, encoder.banned)
    return [group[0] for group in sample(backend, prompts, unused, sampling, budget, progress)]


def _reply(encoder: Encoder, prompt: Prompt, completion: Completion) -> Reply:
    certainty = float(np.mean(completion.logprobs, dtype=np.float64)) if len(completion) else 0.0
    return Reply(encoder.decode(completion.tokens.tolist()), certainty, len(prompt))
