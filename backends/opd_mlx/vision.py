"""Visual features of all images of a call: pieces of one size run as one batch, and every distinct prompt once.

A piece is what a vision tower attends within: a frame of an image, or a tile. mlx-vlm's own forwards split attention image by image, and
compute positions on the host with an evaluation in between. Its modules hold the parameters here too.

Legend: m pieces of one size, S visual tokens, D text width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.memory import feature_bytes, host_memory
from opd.types import Prompt
from opd_mlx.kernels.lanes import LANES

TILE_BYTES = 3 * 2**20 if mx.default_device() == mx.cpu else 2**62
"""Pixels that run together: on a CPU as many as leave what they become in its caches."""

Piece: TypeAlias = tuple[Hashable, NDArray[Any]]
"""A size, and an array of the shape that all pieces of this size have."""

Tower: TypeAlias = Callable[[NDArray[Any], Any], list[mx.array]]
"""From m pieces of one size, stacked, and that size to features [m, tokens of a piece, D]: one for each level."""


def visual_features(prompts: Sequence[Prompt], pieces: Callable[[Prompt], Sequence[Piece]], tower: Tower) -> list[mx.array]:
    """Features [S, D] of all visual tokens in the order of `prompts`, one for each level of `tower`.

    Prompts of equal key are computed once; without any image there are none.
    """
    members: dict[Hashable, list[NDArray[Any]]] = defaultdict(list)
    places: dict[str, list[tuple[Hashable, int]]] = {}
    for prompt in prompts:
        if prompt.key in places or not len(prompt.visual.index):
            continue
        places[prompt.key] = []
        for size, piece in pieces(prompt):
            places[prompt.key].append((size, len(members[size])))
            members[size].append(piece)
    outputs, counts = [], {}
    for size, found in members.items():
        for lane, part in zip(LANES.free, np.array_split(np.stack(found), len(LANES.free)), strict=True):
            together = max(1, TILE_BYTES // part[0].nbytes) if len(part) else 1
            for start in range(0, len(part), together):
                with mx.stream(lane):
                    levels = tower(part[start : start + together], size)
                counts[size] = levels[0].shape[1]
                outputs.append([level.flatten(0, 1) for level in levels])
    levels = [mx.concatenate(list(level)) for level in zip(*outputs, strict=True)]
    starts = dict(zip(members, np.cumsum([0, *(counts[size] * len(found) for size, found in members.items())]), strict=False))
    wanted = [place for prompt in prompts for place in places.get(prompt.key, [])]
    if wanted == [(size, i) for size, found in members.items() for i in range(len(found))]:
        return levels
    rows = np.concatenate([starts[size] + i * counts[size] + np.arange(counts[size]) for size, i in wanted])
    return [level[mx.array(rows.astype(np.int32))] for level in levels]


class KnownFeatures:
    """Features of a frozen tower, by the prompt's key: computed once for rollout, student and teacher."""

    def __init__(self, compute: Callable[[Sequence[Prompt]], list[mx.array]], room: int) -> None:
        """Keeps at most `room` bytes; see `opd.memory.feature_bytes`."""
        self.room = room
        self._compute = compute
        self._levels: dict[str, list[mx.array]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(level.nbytes for levels in self._levels.values() for level in levels)

    def features(self, prompts: Sequence[Prompt]) -> list[mx.array]:
        """What computing them gives, from memory where it is there; above the room the oldest are forgotten, and then what came last."""
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        new = [prompt for key, prompt in wanted.items() if key not in self._levels]
        ends = np.cumsum([len(prompt.visual.index) for prompt in new])[:-1].tolist()
        # Copies, since a part of an array keeps all of it.
        cut = [[mx.contiguous(part) for part in mx.split(level, ends)] for level in self._compute(new)]
        found = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        found |= {prompt.key: list(levels) for prompt, levels in zip(new, zip(*cut, strict=True), strict=True)}
        mx.eval(found)
        self._levels |= found
        spare = self.nbytes - self.room
        for key in [*(key for key in self._levels if key not in wanted), *reversed(found)]:
            if spare > 0:
                spare -= sum(level.nbytes for level in self._levels.pop(key))
        each = [found[prompt.key] for prompt in prompts if prompt.key in found]
        return [mx.concatenate(list(level)) for level in zip(*each, strict=True)]


def feature_room() -> int:
    """Bytes of features that are kept, in memory that a Mac's GPU shares with its processor; see `opd.memory.feature_bytes`."""
    return feature_bytes(host_memory())
