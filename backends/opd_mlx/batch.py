"""Lays out prompts and completions of unequal lengths and counts as padded arrays.

Everything is padded on the right, which causal rows do not see. A prompt's last token predicts the
first token of each completion, so it runs with the completions: row t of a completion holds the
token before target t. The rest of the prompt is the prefix, and completions use only the prefix's
keys and values. A completion's last token predicts nothing, so it is not an input.

Legend: B prompts, P tokens of the longest prefix, n completions of the largest group, T tokens of
the longest completion, M predicted completion tokens, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Group, IntArray, Prompt
from opd_mlx.kernels.scores import Seen


@dataclass(frozen=True)
class Visibility:
    """Which keys a row of an attention layer may attend to: the row's and those of earlier tokens.

    `window` limits them to the last `window` keys, including the row's; None is no limit. With
    `blocks`, the tokens of an image in a prompt also attend to later tokens of the same image.
    """

    window: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class Masks:
    """What is added to the scores of completion rows: -inf at keys that a row does not see, else 0.

    `prefix` [B, 1, 1, T or 1, P] is for the keys of the prefix, of which there are `width`, and
    `completion` [T, keys] for those of the completion; None if rows see all of these keys.
    """

    prefix: mx.array | None
    completion: mx.array | None
    width: int

    def seen(self, rows: slice) -> list[Seen]:
        """What `rows` see of the completion's keys, and of the prefix's keys."""
        completion, prefix, keys = self.completion, self.prefix, slice(0, rows.stop)
        every = slice(None) if prefix is None or prefix.shape[3] == 1 else rows
        return [
            (keys, None if completion is None else lambda _: completion[rows, keys]),
            (
                slice(0, self.width),
                None if prefix is None else lambda _: prefix[:, :, None, :, every],
            ),
        ]


@dataclass(frozen=True)
class Prefixes:
    """Prompts without their last tokens.

    `tokens` are [B * P], `positions` [axes, B * P], `shape` is (B, P), `lengths` are [B], and
    `even` says whether all lengths are equal. `visual_rows` [S] are the rows of image tokens in the
    order of `sources`. `images` [B, P] is the number of the image at each token, -1 at text.
    `reach` [P] is one past the last key that row p of any prompt sees, if the tokens of an image
    attend to each other in both directions.
    """

    sources: Sequence[Prompt]
    tokens: mx.array
    positions: mx.array
    shape: tuple[int, int]
    lengths: mx.array
    even: bool
    visual_rows: mx.array
    images: mx.array
    reach: NDArray[np.intp]

    @property
    def real(self) -> mx.array | None:
        """False at padding, [B, P]; None if all prompts have equal lengths."""
        return None if self.even else mx.arange(self.shape[1]) < self.lengths[:, None]

    def mask(self, visibility: Visibility) -> mx.array | None:
        """Which keys a prompt's rows may attend to, [B or 1, 1, P, P]; None for plain causality.

        Padding is on the right, so causality already hides it from every real row.
        """
        if self._window(visibility) is None and not self._blocks(visibility):
            return None
        whole, rows = slice(0, self.shape[1]), mx.arange(self.shape[1])[:, None]
        return self._sees(visibility, whole, whole, rows)[:, None]

    def seen(self, visibility: Visibility, rows: slice) -> Seen:
        """What `rows` of a prompt see of the prompt's keys."""
        window = self._window(visibility)
        last = int(self.reach[rows].max()) if self._blocks(visibility) else rows.stop
        keys = slice(0 if window is None else max(0, rows.start + 1 - window), last)

        def mask(row: mx.array) -> mx.array:
            sees = self._sees(visibility, rows, keys, row)
            return mx.where(sees, 0.0, -mx.inf)[:, None, None, None]

        return keys, mask

    def masks(self, visibility: Visibility, row: mx.array, keys: int) -> Masks:
        """The masks of completion rows with the numbers `row` [T, 1] for `keys` completion keys."""
        key = mx.arange(keys)
        completion = mx.where(key > row, -mx.inf, 0.0) if keys > 1 else None
        real, prefix = self.real, None
        if real is not None:
            prefix = mx.where(real, 0.0, -mx.inf)[:, None, None, None]
        window = visibility.window
        if window is not None and window < self.shape[1] + keys:
            distance = self.lengths[:, None, None] + row - mx.arange(self.shape[1])
            far = mx.where(distance < window, 0.0, -mx.inf)[:, None, None]
            prefix = far if prefix is None else prefix + far
            completion = mx.where((key > row) | (row - key >= window), -mx.inf, 0.0)
        return Masks(prefix, completion, self.shape[1])

    def _window(self, visibility: Visibility) -> int | None:
        window = visibility.window
        return window if window is not None and window < self.shape[1] else None

    def _blocks(self, visibility: Visibility) -> bool:
        return visibility.blocks and len(self.visual_rows) > 0

    def _sees(self, visibility: Visibility, rows: slice, keys: slice, row: mx.array) -> mx.array:
        """[B or 1, rows, keys], True where a row with the number `row` [rows, 1] sees a key."""
        key = mx.arange(keys.start, keys.stop)
        seen, window = (key <= row)[None], self._window(visibility)
        if self._blocks(visibility):
            of_row, of_key = self.images[:, rows, None], self.images[:, None, keys]
            seen = seen | ((of_row == of_key) & (of_key >= 0))
        return seen if window is None else seen & (row - key < window)


@dataclass(frozen=True)
class DecodeStep:
    """One token step of decoding: the step's `number` [1], and the `count` of completion keys that
    every layer reads.

    If `exact`, `count` is number + 1. Otherwise it may be more, because a compiled step always
    reads the same number of keys.
    """

    number: mx.array
    count: int
    exact: bool

    def masks(self, prefixes: Prefixes, visibility: Visibility) -> Masks:
        """The masks of the completions' rows."""
        masks = prefixes.masks(visibility, self.number[:, None], self.count)
        if self.exact and visibility.window is None:
            return replace(masks, completion=None)
        return masks


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward: `prefixes`, and completion rows with `tokens` [B * n * T],
    `positions` [axes, B * n * T] and `shape` (B, n, T).

    `rows` [M] are the completion rows that have a target, in order of group, completion and token;
    None for all rows.
    """

    prefixes: Prefixes
    tokens: mx.array
    positions: mx.array
    shape: tuple[int, int, int]
    rows: mx.array | None


@dataclass(frozen=True)
class Targets:
    """Completion tokens, the log-probabilities recorded when they were sampled, and weights, [M]
    each.
    """

    tokens: mx.array
    logprobs: mx.array
    weights: mx.array


def lay_out_prefixes(prompts: Sequence[Prompt], at_least: int = 1) -> Prefixes:
    """Pads `prompts`, without their last tokens, to one length of `at_least` tokens.

    Raises ValueError if a prompt ends with an image token.
    """
    lengths = [len(prompt) - 1 for prompt in prompts]
    count, width, axes = len(prompts), max(at_least, *lengths), len(prompts[0].positions)
    tokens = np.zeros((count, width), np.int32)
    positions = np.zeros((axes, count, width), np.int32)
    images = np.full((count, width), -1, np.int32)
    reach = np.arange(1, width + 1)
    for row, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
        index, image = prompt.visual.index, prompt.visual.image
        if length in index:
            raise ValueError("a prompt must not end with an image token")
        tokens[row, :length] = prompt.tokens[:-1]
        positions[:, row, :length] = prompt.positions[:, :-1]
        images[row, index] = image
        ends = np.zeros(len(prompt), np.intp)
        np.maximum.at(ends, image, index + 1)
        reach[index] = np.maximum(reach[index], ends[image])
    visual_rows = [row * width + prompt.visual.index for row, prompt in enumerate(prompts)]
    return Prefixes(
        sources=prompts,
        tokens=mx.array(tokens.reshape(-1)),
        positions=mx.array(positions.reshape(axes, -1)),
        shape=(count, width),
        lengths=mx.array(np.array(lengths, np.int32)),
        even=min(lengths) == width,
        visual_rows=mx.array(np.concatenate(visual_rows).astype(np.int32)),
        images=mx.array(images),
        reach=reach,
    )


def lay_out(prompts: Sequence[Prompt], completions: Sequence[Sequence[IntArray]]) -> Batch:
    """Pads `prompts` and the tokens of each prompt's `completions`."""
    longest = max([1, *(len(tokens) for members in completions for tokens in members)])
    shape = len(prompts), max(map(len, completions)), longest
    inputs = np.zeros(shape, np.int32)
    real = np.zeros(shape, bool)
    positions = np.zeros((len(prompts[0].positions), *shape), np.int32)
    for row, (prompt, members) in enumerate(zip(prompts, completions, strict=True)):
        inputs[row, :, 0] = prompt.tokens[-1]
        positions[:, row] = prompt.row_positions(longest)[:, None]
        for column, tokens in enumerate(members):
            inputs[row, column, 1 : len(tokens)] = tokens[:-1]
            real[row, column, : len(tokens)] = True
    return Batch(
        prefixes=lay_out_prefixes(prompts),
        tokens=mx.array(inputs.reshape(-1)),
        positions=mx.array(positions.reshape(len(positions), -1)),
        shape=shape,
        rows=mx.array(np.flatnonzero(real).astype(np.int32)),
    )


def lay_out_targets(groups: Sequence[Group]) -> Targets:
    """The targets of all completions of `groups`, which are the same for both policies."""
    completions = [completion for group in groups for completion in group.completions]
    weights = [values for group in groups for values in group.weights]
    tokens = np.concatenate([completion.tokens for completion in completions])
    logprobs = np.concatenate([completion.logprobs for completion in completions])
    return Targets(
        tokens=mx.array(tokens.astype(np.int32)),
        logprobs=mx.array(logprobs.astype(np.float32)),
        weights=mx.array(np.concatenate(weights).astype(np.float32)),
    )
