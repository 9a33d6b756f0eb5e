"""The batches of a run: chooses the rows of each step and encodes them for both policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd import randomness
from opd.backend import Backend
from opd.data.dataset import FaultyRow
from opd.method.rollout import Pair
from opd.method.step import Batch
from opd.run import preflight
from opd.run.recipe import Recipe
from opd.types import Encoder, Example
from opd.views import usable
from opd.views.usable import Skipped, Unusable


@dataclass(frozen=True)
class Batches:
    """Encodes the rows of each step; `skipped` counts rows that cannot be used."""

    recipe: Recipe
    backend: Backend
    encoder: Encoder
    examples: Sequence[Example]
    skipped: Skipped

    def encode(self, step: int) -> Batch:
        """This process's share of the rows of `step` (from 1), without rows that cannot be used."""
        seed, prompts = self.recipe.run.seed, self.recipe.rollout.prompts
        rows = randomness.batch(seed, step, prompts, len(self.examples))
        places = range(self.backend.rank, len(rows), self.backend.size)
        encoded = [self._encoded(int(rows[place]), place) for place in places]
        pairs = tuple(pair for pair in encoded if pair is not None)
        return Batch(pairs, len(places) - len(pairs))

    def lack_prompts(self, batch: Batch) -> bool:
        """Whether any process has no prompt in the step; every process calls it and gets the same
        result."""
        return bool(self.backend.total(np.array([float(not batch.pairs)]))[0])

    def none_usable(self) -> str:
        """The reason why none of at most `preflight.SAMPLE` rows can be used, for a message; empty
        if a row can."""
        count = min(len(self.examples), preflight.SAMPLE)
        if any(self._encoded(index * len(self.examples) // count, 0) for index in range(count)):
            return ""
        few = len(self.examples) > preflight.SAMPLE
        none = (
            f"none of {preflight.SAMPLE} rows spread over the data" if few else "none in the data"
        )
        return f"{none} ({self.skipped.why()})"

    def _encoded(self, row: int, place: int) -> Pair | None:
        """The prompts of a row for both policies; None if the row cannot be used. The reference
        answer is removed, since training must not read it."""
        try:
            example = replace(self.examples[row], answer=None)
        except FaultyRow as error:
            self.skipped.add(error.source, Unusable(str(error)))
            return None
        try:
            prompts = usable.encode(
                self.encoder, example, self.recipe.seeded_view, self.recipe.data.max_prompt_tokens
            )
        except Unusable as error:
            self.skipped.add(example, error)
            return None
        return Pair(place, example.id, example.weight, *prompts)
