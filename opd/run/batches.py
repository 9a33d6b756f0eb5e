"""The batches of a run: which rows stand in a step, encoded for both policies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from opd import randomness
from opd.backend import Backend
from opd.method.rollout import Pair
from opd.method.step import Batch
from opd.run import preflight
from opd.run.recipe import Recipe
from opd.types import Encoder, Example
from opd.views import usable
from opd.views.usable import Skipped, Unusable


@dataclass(frozen=True)
class Batches:
    """Encodes the rows of each step; rows that cannot be used are counted in `skipped`."""

    recipe: Recipe
    backend: Backend
    encoder: Encoder
    examples: Sequence[Example]
    skipped: Skipped

    def encode(self, step: int) -> Batch:
        """This process's share of a step's rows. A row that cannot be read, or is too long, is left
        out."""
        seed, prompts = self.recipe.run.seed, self.recipe.rollout.prompts
        rows = randomness.batch(seed, step, prompts, len(self.examples))
        places = range(self.backend.rank, len(rows), self.backend.size)
        pairs = [
            pair for place in places if (pair := self._encoded(int(rows[place]), place)) is not None
        ]
        return Batch(tuple(pairs), len(places) - len(pairs))

    def lack_prompts(self, batch: Batch) -> bool:
        """Whether a process has no prompt in a step; the same on every process."""
        return bool(self.backend.total(np.array([float(not batch.pairs)]))[0])

    def none_usable(self) -> str:
        """Why no row of the data can be used, of a sample where the data are large; empty where one
        can."""
        count = min(len(self.examples), preflight.SAMPLE)
        if any(self._encoded(index * len(self.examples) // count, 0) for index in range(count)):
            return ""
        few = len(self.examples) > preflight.SAMPLE
        none = (
            f"none of {preflight.SAMPLE} rows spread over the data" if few else "none in the data"
        )
        return f"{none} ({self.skipped.why()})"

    def _encoded(self, row: int, place: int) -> Pair | None:
        """A row as both policies see it, without its answer: the method has no labels. None where
        it cannot be used."""
        example = replace(self.examples[row], answer=None)
        try:
            prompts = usable.encode(
                self.encoder, example, self.recipe.view, self.recipe.data.max_prompt_tokens
            )
        except Unusable as error:
            self.skipped.add(example, error)
            return None
        return Pair(place, example.id, example.weight, *prompts)
