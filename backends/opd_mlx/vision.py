"""Visual features of all images of a call: images of one size run as one batch, each prompt once.

An image is here what a vision tower attends within: a frame, or a tile. mlx-vlm's own forwards
split attention image by image, and compute positions on the host with an evaluation in between.
Its modules hold the parameters here too.

Legend: m images of one size, S visual tokens, D text width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Prompt

ImageBatch: TypeAlias = list[tuple[Hashable, NDArray[np.generic]]]
"""A prompt's images in the order of their visual tokens: the size that decides which run together,
and an array, of one shape for each size."""

Tower: TypeAlias = Callable[[NDArray[np.generic], Any], list[mx.array]]
"""From m images of one size, and that size, to features [m, tokens of an image, D] by level."""


def visual_features(
    prompts: Sequence[Prompt],
    images: Callable[[Prompt], ImageBatch],
    tower: Tower,
    pixel_bytes: int,
) -> list[mx.array]:
    """Features [S, D] of all visual tokens in the order of `prompts`, for each level of `tower`.

    Prompts of equal key are computed once; without any image the list is empty. At most
    `pixel_bytes` of images run together, or one image.
    """
    members: dict[Hashable, list[NDArray[np.generic]]] = defaultdict(list)
    places: dict[str, list[tuple[Hashable, int]]] = {}
    for prompt in prompts:
        if prompt.key in places or not len(prompt.visual.index):
            continue
        places[prompt.key] = []
        for size, image in images(prompt):
            places[prompt.key].append((size, len(members[size])))
            members[size].append(image)
    outputs, counts = [], {}
    for size, same in members.items():
        together = max(1, pixel_bytes // same[0].nbytes)
        for start in range(0, len(same), together):
            levels = tower(np.stack(same[start : start + together]), size)
            counts[size] = levels[0].shape[1]
            outputs.append([level.flatten(0, 1) for level in levels])
    levels = [mx.concatenate(list(level)) for level in zip(*outputs, strict=True)]
    wanted = [place for prompt in prompts for place in places.get(prompt.key, [])]
    if wanted == [(size, i) for size, same in members.items() for i in range(len(same))]:
        return levels
    ends = np.cumsum([counts[size] * len(same) for size, same in members.items()])
    starts = dict(zip(members, [0, *ends], strict=False))
    rows = np.concatenate(
        [starts[size] + i * counts[size] + np.arange(counts[size]) for size, i in wanted]
    )
    return [level[mx.array(rows.astype(np.int32))] for level in levels]


class FeatureCache:
    """Features of a frozen tower by the prompt's key, for rollout, student and teacher."""

    def __init__(
        self, compute: Callable[[Sequence[Prompt]], list[mx.array]], capacity: int
    ) -> None:
        """Keeps at most `capacity` bytes."""
        self.capacity = capacity
        self._compute = compute
        self._levels: dict[str, list[mx.array]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the features that are kept."""
        return sum(level.nbytes for levels in self._levels.values() for level in levels)

    def features(self, prompts: Sequence[Prompt]) -> list[mx.array]:
        """Features as `compute` gives them, from the cache where it has them.

        Above the capacity the cache forgets the oldest first, and then the newest of this call.
        """
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        by_key = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        for key, prompt in wanted.items():
            if key not in by_key:
                # One by one, so that no last bit depends on what ran beside it: a run that goes on
                # from a checkpoint has another cache than the run that wrote it.
                by_key[key] = self._compute([prompt])
                mx.eval(by_key[key])
        self._levels |= by_key
        excess = self.nbytes - self.capacity
        for key in [*(key for key in self._levels if key not in wanted), *reversed(by_key)]:
            if excess > 0:
                excess -= sum(level.nbytes for level in self._levels.pop(key))
        each = [by_key[prompt.key] for prompt in prompts if prompt.key in by_key]
        return [mx.concatenate(list(level)) for level in zip(*each, strict=True)]
