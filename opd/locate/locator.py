"""The interface of locators, and the loop that runs one over rows.

Legend: L layers, T tokens of an answer, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from opd.backend import Backend
from opd.data.dataset import FaultyRow
from opd.method.rollout import sample
from opd.prefetch import prefetch
from opd.types import Box, Completion, Encoder, Example, Prompt, Sampling
from opd.views.piece import Size
from opd.views.usable import Skipped, Unusable
from opd.views.view import ViewOptions


@dataclass(frozen=True)
class Located:
    """The result for one example: `boxes` in pixels of its upright images, none if nothing was
    found, and the `confidence` in 0..1, whose meaning the locator says; 0 without boxes."""

    boxes: tuple[Box, ...] = ()
    confidence: float = 0.0


NOTHING = Located()


@dataclass(frozen=True)
class Looker:
    """The model that looks, with all that locators need of a recipe.

    `name`: the model's path, for messages; `config`: its config.json. `view` says the margins and
    sizes of crops. `max_tokens`: longest answer; `limit`: longest prompt. `sample_tokens`,
    `microbatch_tokens`: padded tokens that are sampled, or whose attention is read, together.
    """

    name: str
    config: Mapping[str, Any]
    backend: Backend
    encoder: Encoder
    view: ViewOptions
    max_tokens: int
    limit: int
    sample_tokens: int
    microbatch_tokens: int

    def answers(self, prompts: Sequence[Prompt], at_least: int = 1) -> list[Completion]:
        """The student's greedy answer to each prompt, of up to `max_tokens` or `at_least`
        tokens."""
        unused = np.zeros((len(prompts), 1, max(at_least, self.max_tokens)), np.float32)
        sampling = Sampling(0.0, self.encoder.stop, self.encoder.banned)
        answers = sample(self.backend, prompts, unused, sampling, self.sample_tokens)
        return [one for (one,) in answers]


class Locator(Protocol):
    """A way to find the evidence of examples. Threads share a locator, so it keeps no state."""

    @property
    def name(self) -> str:
        """The name, as `--by` takes it."""

    @property
    def rows(self) -> int:
        """The number of examples that are located together."""

    def check(self, looker: Looker) -> None:
        """Raises UserError if this model cannot be asked in this way."""

    def prompts(self, looker: Looker, example: Example) -> list[Prompt]:
        """The prompts that the model gets for an example. Raises Unusable."""

    def locate(
        self, looker: Looker, examples: Sequence[Example], prompts: Sequence[Sequence[Prompt]]
    ) -> list[Located]:
        """The evidence of every example, from the `prompts` of each."""


def picture_sizes(prompt: Prompt) -> list[Size]:
    """The (width, height) in pixels of a prompt's images, as the encoder got them."""
    visual = prompt.visual
    ends = np.zeros((int(visual.image.max(initial=-1)) + 1, 2))
    np.maximum.at(ends, visual.image, visual.boxes[:, 2:])
    return [(round(width), round(height)) for width, height in ends.tolist()]


def certainty(completion: Completion) -> float:
    """The geometric mean of the probabilities of an answer's tokens, in 0..1."""
    return float(np.exp(np.mean(completion.logprobs, dtype=np.float64)))


def locate(
    locator: Locator,
    looker: Looker,
    examples: Sequence[Example],
    skipped: Skipped,
    passed: Callable[[int], None] = lambda rows: None,
    wanted: Callable[[Example], bool] = lambda example: True,
) -> Iterator[list[tuple[Example, Located]]]:
    """Yields the located examples in order, slice by slice; the next slice is encoded while one is
    located. An example that cannot be used is left out and added to `skipped`; one that is not
    `wanted` is left out. `passed` hears how many examples each slice has passed, usable or not.
    """
    locator.check(looker)

    def encode(start: int) -> tuple[list[Example], list[list[Prompt]], int]:
        """The usable examples of a slice, their prompts, and the number of all examples in it."""
        usable: list[Example] = []
        prompts: list[list[Prompt]] = []
        places = range(start, min(start + locator.rows, len(examples)))
        for place in places:
            try:
                example = examples[place]
            except FaultyRow as error:  # of a large file, whose rows are read when they are reached
                skipped.add(Example(error.source, (), ""), Unusable(str(error)))
                continue
            if not wanted(example):
                continue
            try:
                prompts.append(locator.prompts(looker, example))
                usable.append(example)
            except Unusable as error:
                skipped.add(example, error)
        return usable, prompts, len(places)

    for usable, prompts, count in prefetch(encode, range(0, len(examples), locator.rows)):
        if usable:
            found = locator.locate(looker, usable, prompts)
            yield list(zip(usable, found, strict=True))
        passed(count)
