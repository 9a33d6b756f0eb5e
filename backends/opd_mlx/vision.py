"""Computes the image features of many prompts.

Images of one size run together, prompts of equal key run once, and features of a frozen tower are
cached. An image is here a frame or a tile, within which the tower attends. mlx-vlm's modules hold
the parameters; mlx-vlm's forwards are not used, because they run image by image and evaluate in
between.

Legend: m images of one size, S visual tokens of all prompts, D width of the language trunk.
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
"""A prompt's images in the order of their visual tokens: the size, and the array for the tower.
Images of equal sizes have arrays of equal shapes, and run together."""

Tower: TypeAlias = Callable[[NDArray[np.generic], Any], list[mx.array]]
"""Computes features [m, tokens per image, D] for each level, from m images of one size."""


def visual_features(
    prompts: Sequence[Prompt],
    images: Callable[[Prompt], ImageBatch],
    tower: Tower,
    pixel_bytes: int,
) -> list[mx.array]:
    """Computes features [S, D] for each level of the `tower`, in the order of `prompts`.

    Prompts of equal key are computed once. The list is empty if no prompt has an image. At most
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
    """Caches the features of a frozen tower by the prompt's key, so that rollout, student and
    teacher compute them once.
    """

    def __init__(
        self, compute: Callable[[Sequence[Prompt]], list[mx.array]], capacity: int
    ) -> None:
        """Caches at most `capacity` bytes (`Device.feature_bytes`)."""
        self.capacity = capacity
        self._compute = compute
        self._levels: dict[str, list[mx.array]] = {}

    @property
    def nbytes(self) -> int:
        """The bytes of all cached features."""
        return sum(level.nbytes for levels in self._levels.values() for level in levels)

    def features(self, prompts: Sequence[Prompt]) -> list[mx.array]:
        """Features [S, D] for each level; calls `compute` with each prompt that is not cached.

        Above the capacity the least recently used features are dropped first, then the newest.
        """
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        by_key = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        for key, prompt in wanted.items():
            if key not in by_key:
                # Prompt by prompt, so that the result does not depend on the rest of the batch even
                # in the last bit: a resumed run has another cache than the run that wrote the
                # checkpoint.
                by_key[key] = self._compute([prompt])
                mx.eval(by_key[key])
        self._levels |= by_key
        excess = self.nbytes - self.capacity
        for key in [*(key for key in self._levels if key not in wanted), *reversed(by_key)]:
            if excess > 0:
                excess -= sum(level.nbytes for level in self._levels.pop(key))
        each = [by_key[prompt.key] for prompt in prompts if prompt.key in by_key]
        return [mx.concatenate(list(level)) for level in zip(*each, strict=True)]
