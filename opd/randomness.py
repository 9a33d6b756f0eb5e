"""All randomness of a run, from numpy's counter-based Philox generator.

Every number is a pure function of seed, purpose and place, so a run depends neither on the backend
nor on how a step is cut into micro-batches or processes, and there is no state to save.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from opd.types import FloatArray


class Purpose(IntEnum):
    """Second half of the generator's key: streams of different purposes never overlap."""

    ROLLOUT = 1
    ORDER = 2
    BOOTSTRAP = 3
    ADAPTER = 4


def generator(seed: int, purpose: Purpose, *place: int) -> np.random.Generator:
    """A generator for one place (at most three numbers) of one purpose."""
    counter = np.zeros(4, dtype=np.uint64)
    counter[1 : 1 + len(place)] = place
    # The lowest word of the counter counts the draws themselves.
    return np.random.Generator(
        np.random.Philox(counter=counter, key=np.array([seed, purpose], dtype=np.uint64))
    )


def uniforms(
    seed: int, step: int, places: Sequence[int], completions: int, max_tokens: int
) -> FloatArray:
    """Uniform random numbers float32 [B, n, max_tokens] in [0, 1), one for each token, keyed by
    seed, step, place, completion and position.

    `places` [B]: index of each prompt in the step's whole batch, over all processes. A row that
    occurs twice in a step has two places, so the row gets different completions.
    """
    drawn = np.empty((len(places), completions, max_tokens), dtype=np.float32)
    for row, place in enumerate(places):
        for completion in range(completions):
            generator(seed, Purpose.ROLLOUT, completion, place, step).random(
                dtype=np.float32, out=drawn[row, completion]
            )
    return drawn


def batch(seed: int, step: int, prompts: int, examples: int) -> NDArray[np.int64]:
    """Indices [prompts] of the examples that step `step` (from 1) trains on, each in
    0..`examples` - 1. Every epoch is a permutation of all examples; a batch may cross epochs."""
    places = np.arange((step - 1) * prompts, step * prompts)
    epochs, offsets = np.divmod(places, examples)
    indices = np.empty(prompts, dtype=np.int64)
    for epoch in np.unique(epochs):
        order = generator(seed, Purpose.ORDER, int(epoch)).permutation(examples)
        indices[epochs == epoch] = order[offsets[epochs == epoch]]
    return indices
