"""The interface of locators, and the loop that runs one over rows.

Legend: L layers, T tokens of an answer, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from opd.backend import Backend
from opd.errors import DataError
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
    sizes of crops. `max_tokens`: longest answer; `limit`: longest prompt; `budget`: padded tokens
    that run together.
    """

    name: str
    config: Mapping[str, Any]
    backend: Backend
    encoder: Encoder
    view: ViewOptions
    max_tokens: int
    limit: int
    budget: int

    def answers(self, prompts: Sequence[Prompt], at_least: int = 1) -> list[Completion]:
        """The student's greedy answer to each prompt, of up to `max_tokens` or `at_least`
        tokens."""
        unused = np.zeros((len(prompts), 1, max(at_least, self.max_tokens)), np.float32)
        sampling = Sampling(0.0, self.encoder.stop, self.encoder.banned)
        return [one for (one,) in sample(self.backend, prompts, unused, sampling, self.budget)]


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

    def encode(start: int) -> tuple[list[Example], list[list[Prompt]]]:
        usable, prompts = [], []
        for place in range(start, min(start + locator.rows, len(examples))):
            try:
                example = examples[place]
            except DataError as error:  # a row of a large file, which is read just now
                skipped.add(_unread(error, place), Unusable(str(error)))
                continue
            if not wanted(example):
                continue
            try:
                prompts.append(locator.prompts(looker, example))
                usable.append(example)
            except Unusable as error:
                skipped.add(example, error)
        return usable, prompts

    starts = range(0, len(examples), locator.rows)
    for start, (usable, prompts) in zip(starts, prefetch(encode, starts), strict=True):
        if usable:
            found = locator.locate(looker, usable, prompts)
            yield list(zip(usable, found, strict=True))
        passed(min(locator.rows, len(examples) - start))


def _unread(error: DataError, place: int) -> Example:
    """An example that stands for a row that could not be read, for its name."""
    return Example(str(getattr(error, "source", f"row {place + 1}")), (), "")
