"""The vision tower over all images of a call: images of one size run as one batch, the patch embedding as one matrix product.

mlx-vlm's own forward splits attention image by image, and computes positions on the host with an evaluation in between. Its modules
hold the parameters here too.

Legend: m images of one size, L patches of an image, F values of a patch, S visual tokens, D text width.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import checkpoint
from numpy.typing import NDArray

from opd.types import Prompt
from opd_mlx.attention import attend

KNOWN_BYTES = 2**30
"""Features of a frozen tower that are kept, of all prompts together."""


def visual_features(visual: Any, prompts: Sequence[Prompt], again: bool = False) -> list[mx.array]:
    """Features [S, D] of all visual tokens in the order of `prompts`: for the embeddings, then for each deepstack layer.

    Prompts of equal key are computed once; without any image there are none. `again` computes blocks again in a backward.
    """
    frames: dict[tuple[int, int], list[NDArray[np.generic]]] = defaultdict(list)
    places: dict[str, list[tuple[tuple[int, int], int]]] = {}
    for prompt in prompts:
        if prompt.key in places or not len(prompt.visual.index):
            continue
        places[prompt.key] = []
        for size, patches in _frames(prompt):
            places[prompt.key].append((size, len(frames[size])))
            frames[size].append(patches)
    outputs = []
    for size, members in frames.items():
        for lane, part in zip(LANES.streams, np.array_split(np.stack(members), len(LANES.streams)), strict=True):
            if len(part):
                with mx.stream(lane):
                    outputs.append(_tower(visual, mx.array(part.reshape(-1, part.shape[-1])), size, again))
    levels = [mx.concatenate(list(level)) for level in zip(*outputs, strict=True)]
    counts = {size: size[0] * size[1] // visual.spatial_merge_size**2 for size in frames}
    starts = dict(zip(frames, np.cumsum([0, *(counts[size] * len(members) for size, members in frames.items())]), strict=False))
    wanted = [place for prompt in prompts for place in places.get(prompt.key, [])]
    if wanted == [(size, i) for size, members in frames.items() for i in range(len(members))]:
        return levels
    rows = np.concatenate([starts[size] + i * counts[size] + np.arange(counts[size]) for size, i in wanted])
    return [level[mx.array(rows.astype(np.int32))] for level in levels]


class KnownFeatures:
    """Features of a frozen tower, by the prompt's key: computed once for rollout, student and teacher."""

    def __init__(self, visual: Any) -> None:
        self._visual = visual
        self._levels: dict[str, list[mx.array]] = {}

    def features(self, prompts: Sequence[Prompt]) -> list[mx.array]:
        """What `visual_features` gives, from memory where it is there; the oldest are forgotten above KNOWN_BYTES."""
        wanted = {prompt.key: prompt for prompt in prompts if len(prompt.visual.index)}
        new = [prompt for key, prompt in wanted.items() if key not in self._levels]
        ends = np.cumsum([len(prompt.visual.index) for prompt in new])[:-1].tolist()
        cut = [mx.split(level, ends) for level in visual_features(self._visual, new)]
        found = {key: self._levels.pop(key) for key in wanted if key in self._levels}
        found |= {prompt.key: list(levels) for prompt, levels in zip(new, zip(*cut, strict=True), strict=True)}
        mx.eval(found)
        self._levels |= found
        spare = sum(level.nbytes for levels in self._levels.values() for level in levels) - KNOWN_BYTES
        for key in [key for key in self._levels if key not in wanted]:
            if spare > 0:
                spare -= sum(level.nbytes for level in self._levels.pop(key))
        each = [found[prompt.key] for prompt in prompts if prompt.key in found]
        return [mx.concatenate(list(level)) for level in zip(*each, strict=True)]


class _Lanes(threading.local):
    """Streams among which images of one size are divided: MLX runs a CPU stream on one core, so one for each of them there.

    A stream belongs to the thread that made it.
    """

    def __init__(self) -> None:
        more = min(os.cpu_count() or 1, 8) - 1 if mx.default_device() == mx.cpu else 0
        self.streams = [mx.default_stream(mx.default_device()), *(mx.new_stream(mx.cpu) for _ in range(more))]


LANES = _Lanes()


def _frames(prompt: Prompt) -> list[tuple[tuple[int, int], NDArray[np.generic]]]:
    """Size in patches, and patches [L, F], of every frame of a prompt's images; attention never leaves a frame."""
    sizes = [(int(h), int(w)) for t, h, w in prompt.images["image_grid_thw"] for _ in range(t)]
    cuts = np.cumsum([h * w for h, w in sizes])[:-1]
    return list(zip(sizes, np.split(prompt.images["pixel_values"], cuts), strict=True))


def _tower(visual: Any, patches: mx.array, size: tuple[int, int], again: bool) -> list[mx.array]:
    """Merged features [m * L / merge^2, D] of `patches` [m * L, F], and those of each deepstack layer."""
    projection = visual.patch_embed.proj
    kernel = projection.weight.transpose(4, 1, 2, 3, 0).reshape(-1, projection.weight.shape[0])
    hidden = mx.addmm(projection.bias, patches.astype(kernel.dtype), kernel)
    index, weights = _interpolation(*size, visual.num_grid_per_side, visual.spatial_merge_size)
    positions = (visual.pos_embed(mx.array(index)) * mx.array(weights, dtype=kernel.dtype)[..., None]).sum(0)
    hidden = (hidden.reshape(-1, *positions.shape) + positions).reshape(hidden.shape)
    angles = _angles(*size, visual.blocks[0].attn.head_dim, visual.spatial_merge_size)
    rotary = mx.array(np.cos(angles)), mx.array(np.sin(angles))
    levels = []
    for number, block in enumerate(visual.blocks):

        def run(hidden: mx.array, block: Any = block) -> mx.array:
            hidden = hidden + _attention(block.attn, block.norm1(hidden), rotary)
            out: mx.array = hidden + block.mlp.linear_fc2(_gelu(block.mlp.linear_fc1(block.norm2(hidden))))
            return out

        hidden = (checkpoint(block, run) if again else run)(hidden)
        if number in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
            levels.append(merger(hidden))
    return [visual.merger(hidden), *levels]


def _gelu(x: mx.array) -> mx.array:
    """The tanh form of GELU as x * sigmoid: the same function, without the power and the hyperbolic cosine of MLX's own."""
    return x * mx.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * mx.square(x)))


def _attention(attention: Any, hidden: mx.array, rotary: tuple[mx.array, mx.array]) -> mx.array:
    """Full attention within each image; hidden [m * L, width], rotary cosines and sines [L, head width] in float32."""
    patches, heads = rotary[0].shape[0], attention.num_heads
    query, key, value = attention.qkv(hidden).reshape(-1, patches, 3, heads, attention.head_dim).transpose(2, 0, 3, 1, 4)
    query, key = _rotate(query, *rotary), _rotate(key, *rotary)
    mixed = attend(query, key, value, attention.scale)
    out: mx.array = attention.proj(mixed.transpose(0, 2, 1, 3).reshape(hidden.shape))
    return out


def _rotate(heads: mx.array, cosines: mx.array, sines: mx.array) -> mx.array:
    first, second = mx.split(heads, 2, axis=-1)
    return (heads * cosines + mx.concatenate([-second, first], axis=-1) * sines).astype(heads.dtype)


@lru_cache(maxsize=256)
def _interpolation(height: int, width: int, side: int, merge: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Bilinear resampling of the learned side x side positions to an image's patches: ids and weights, both [4, L], in patch order."""
    rows, columns = (np.linspace(0, side - 1, count, dtype=np.float32) for count in (height, width))
    row, column = rows.astype(np.int32), columns.astype(np.int32)
    below, right = np.minimum(row + 1, side - 1), np.minimum(column + 1, side - 1)
    down, across = (rows - row)[:, None], (columns - column)[None]
    index = np.stack([y[:, None] * side + x[None] for y in (row, below) for x in (column, right)])
    weights = np.stack([(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across])
    return _merged(index, merge), _merged(weights, merge)


@lru_cache(maxsize=256)
def _angles(height: int, width: int, head: int, merge: int) -> NDArray[np.float32]:
    """Rotary angles [L, head width]: a quarter of the frequencies for the row, a quarter for the column, and both again."""
    frequencies = 1.0 / 10000.0 ** (np.arange(0, head // 2, 2, dtype=np.float32) / (head // 2))
    row, column = _merged(np.indices((height, width)), merge)
    angles = np.concatenate([row[:, None] * frequencies, column[:, None] * frequencies], axis=-1)
    return np.concatenate([angles, angles], axis=-1).astype(np.float32)


def _merged(grid: NDArray[Any], merge: int) -> NDArray[Any]:
    """[..., rows, columns] as [..., L] in the order of patches: the merge x merge patches of a visual token stand together."""
    *lead, height, width = grid.shape
    blocks = grid.reshape(*lead, height // merge, merge, width // merge, merge)
    return np.ascontiguousarray(np.swapaxes(blocks, -3, -2).reshape(*lead, height * width))
