"""Lays out prompts and completions of unequal lengths and counts as device arrays.

A prompt's last token predicts the first token of each completion, so it runs with the completions:
row t of a completion holds the token before target t. The rest of the prompt is the prefix, and
completions use only the prefix's keys and values. A completion's last token predicts nothing, so it
is not an input. Rows are packed without padding; only attention computes on padding.

Legend: B prompts, N tokens of all prefixes, P tokens of the longest prefix, R completions of all
prompts, M tokens of all completions, T tokens of the longest completion, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import Group, IntArray, Prompt
from opd_torch.ragged import Owner, Ragged, index_tensor


@dataclass(frozen=True)
class Visibility:
    """Which keys a row of an attention layer may attend to: the row's and those of earlier tokens.

    `window` limits them to the last `window` keys, including the row's; None is no limit. With
    `blocks`, the tokens of an image in a prompt also attend to later tokens of the same image.
    """

    window: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class Prefixes:
    """Prompts without their last tokens: `tokens` [N], `positions` [axes, N], lengths in `ragged`.

    `visual_rows` [S] are the packed rows of image tokens, in the order of `sources`. A mask is
    computed when a layer first asks for it.
    """

    sources: Sequence[Prompt]
    tokens: Tensor
    positions: Tensor
    ragged: Ragged
    visual_rows: Tensor
    _masks: dict[Visibility, Tensor | None] = field(default_factory=dict)
    _bias: dict[torch.dtype, Tensor | None] = field(default_factory=dict)

    def mask(self, visibility: Visibility) -> Tensor | None:
        """Which keys a prompt's rows may attend to, [B or 1, 1, P, P]; None for plain causality."""
        if visibility not in self._masks:
            self._masks[visibility] = self._mask(visibility)
        return self._masks[visibility]

    def seen(self, visibility: Visibility, rows: Tensor, count: int) -> Tensor | None:
        """Which keys of the prefix a completion's `rows` [T, 1] attend to, [B, 1, T or 1, P]; None
        for all keys.

        All rows are below `count`. Row 0 of a completion directly follows the prefix.
        """
        window = visibility.window
        if window is None or window >= self.ragged.longest + count:
            return None if self.ragged.even else self._real
        keys = torch.arange(self.ragged.longest, device=rows.device)
        distance = self.ragged.counts[:, None, None, None] + rows - keys
        return self._real & (distance < window)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """0 for a prompt's keys and minus infinity for padding, [B, 1, 1, P]; None without
        padding.
        """
        if dtype not in self._bias:
            bias = None
            if not self.ragged.even:
                bias = torch.zeros_like(self._real, dtype=dtype)
                bias = bias.masked_fill_(~self._real, float("-inf"))
            self._bias[dtype] = bias
        return self._bias[dtype]

    def select(self, prompts: NDArray[np.int64]) -> Prefixes:
        """Selects `prompts`, padded to the same P as before, because layers' caches have that P."""
        device = self.tokens.device
        selected = lay_out_prefixes([self.sources[prompt] for prompt in prompts], device)
        ragged = Ragged(selected.ragged.lengths, device, self.ragged.longest)
        return replace(selected, ragged=ragged)

    @cached_property
    def _real(self) -> Tensor:
        """False for padding, [B, 1, 1, P]."""
        keys = torch.arange(self.ragged.longest, device=self.tokens.device)
        return keys < self.ragged.counts[:, None, None, None]

    def _mask(self, visibility: Visibility) -> Tensor | None:
        longest, device = self.ragged.longest, self.tokens.device
        images = _images(self.sources, longest) if visibility.blocks else None
        window = visibility.window
        if window is not None and window >= longest:
            window = None
        # Padding is at the end, so causality already hides it from every real row.
        if window is None and images is None:
            return None
        place = torch.arange(longest, device=device)
        distance = place[:, None] - place
        allowed = (distance >= 0)[None, None]
        if images is not None:
            image = torch.from_numpy(images).to(device)[:, None]
            same = image[..., :, None] == image[..., None, :]
            allowed = allowed | (same & (image >= 0)[..., None])
        return allowed if window is None else allowed & (distance < window)


@dataclass(frozen=True)
class DecodeStep:
    """One token step of decoding: the step's `number` [1], on the device, the `count` of completion
    keys that every layer reads, and the tokens of the `buffer` that holds them.

    If `exact`, `count` is number + 1. Otherwise it may be more, because a recorded step always
    reads the same number of keys.
    """

    number: Tensor
    count: int
    exact: bool
    buffer: int
    _masks: dict[Visibility, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def masks(
        self, prefixes: Prefixes, visibility: Visibility
    ) -> tuple[Tensor | None, Tensor | None]:
        """Which keys a completion's row attends to: of the prefix [B, 1, 1, P] and of the
        completion [count]; None for all keys.
        """
        if visibility not in self._masks:
            distance = self.number - torch.arange(self.count, device=self.number.device)
            window = visibility.window
            of_completion = None if self.exact else distance >= 0
            if window is not None and window < self.count:
                near = distance < window
                of_completion = near if of_completion is None else of_completion & near
            of_prefix = prefixes.seen(visibility, self.number[:, None], self.count)
            self._masks[visibility] = of_prefix, of_completion
        return self._masks[visibility]


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward: `prefixes`, and completion rows with `tokens` [M], `positions`
    [axes, M] and lengths in `ragged`.

    Every row has a target. Rows are in order of group, completion and token, so the rows of a
    prompt are consecutive; `prompts` has the number of rows of each prompt. A mask is computed when
    a layer first asks for it.
    """

    prefixes: Prefixes
    tokens: Tensor
    positions: Tensor
    ragged: Ragged
    prompts: Ragged
    owner: Owner
    _masks: dict[Visibility, Tensor] = field(default_factory=dict)

    def mask(self, visibility: Visibility) -> Tensor:
        """Which keys each completion row may attend to, [R or 1, 1, T, P + T]: first the prefix's
        keys, then the completion's.
        """
        if visibility not in self._masks:
            length = self.ragged.longest
            place = torch.arange(length, device=self.tokens.device)
            distance = place[:, None] - place
            of_completion = distance >= 0
            if visibility.window is not None:
                of_completion = of_completion & (distance < visibility.window)
            of_completion = of_completion[None, None]
            of_prefix = self.prefixes.seen(visibility, place[:, None], length)
            if of_prefix is None:
                of_prefix = of_completion.new_ones(1, 1, length, self.prefixes.ragged.longest)
            else:
                of_prefix = self.owner.spread(of_prefix).expand(-1, -1, length, -1)
                of_completion = of_completion.expand(len(of_prefix), -1, -1, -1)
            self._masks[visibility] = torch.cat([of_prefix, of_completion], -1)
        return self._masks[visibility]


@dataclass(frozen=True)
class Targets:
    """Completion tokens, the log-probabilities recorded when they were sampled, and weights, [M]
    each.
    """

    tokens: Tensor
    logprobs: Tensor
    weights: Tensor


def lay_out_prefixes(
    prompts: Sequence[Prompt], device: torch.device, multiple: int = 1
) -> Prefixes:
    """Packs `prompts` without their last tokens; P becomes a multiple of `multiple` tokens.

    Raises ValueError if a prompt has fewer than two tokens, or ends with an image token.
    """
    lengths = np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int64)
    for prompt, length in zip(prompts, lengths, strict=True):
        if length < 1 or length in prompt.visual.index:
            raise ValueError("a prompt has at least two tokens, and its last is not an image token")
    starts = np.cumsum(lengths) - lengths
    visual = [prompt.visual.index + start for prompt, start in zip(prompts, starts, strict=True)]
    positions = np.concatenate([prompt.positions[:, :-1] for prompt in prompts], axis=1)
    return Prefixes(
        sources=prompts,
        tokens=index_tensor(np.concatenate([prompt.tokens[:-1] for prompt in prompts]), device),
        positions=index_tensor(positions, device),
        ragged=Ragged(lengths, device, -(-int(lengths.max()) // multiple) * multiple),
        visual_rows=index_tensor(np.concatenate(visual), device),
    )


def lay_out(
    prompts: Sequence[Prompt], completions: Sequence[Sequence[IntArray]], device: torch.device
) -> Batch:
    """Packs `prompts` and the tokens of each prompt's `completions`; at least one completion must
    not be empty.
    """
    return lay_out_completions(lay_out_prefixes(prompts, device), completions)


def lay_out_completions(prefixes: Prefixes, completions: Sequence[Sequence[IntArray]]) -> Batch:
    """Packs the tokens of each prompt's `completions` behind `prefixes`; at least one completion
    must not be empty.
    """
    device = prefixes.tokens.device
    flat = [
        (prompt, tokens)
        for prompt, members in zip(prefixes.sources, completions, strict=True)
        for tokens in members
    ]
    inputs = [np.append(prompt.tokens[-1:], tokens[:-1]) for prompt, tokens in flat if len(tokens)]
    positions = [prompt.row_positions(len(tokens)) for prompt, tokens in flat if len(tokens)]
    lengths = np.array([len(tokens) for _, tokens in flat], dtype=np.int64)
    rows = np.array([sum(map(len, members)) for members in completions], dtype=np.int64)
    return Batch(
        prefixes=prefixes,
        tokens=index_tensor(np.concatenate(inputs), device),
        positions=index_tensor(np.concatenate(positions, axis=1), device),
        ragged=Ragged(lengths, device),
        prompts=Ragged(rows, device),
        owner=Owner([len(members) for members in completions], device),
    )


def lay_out_targets(groups: Sequence[Group], device: torch.device) -> Targets:
    """The targets of all completions of `groups`, which are the same for both policies."""
    completions = [completion for group in groups for completion in group.completions]
    tokens = np.concatenate([completion.tokens for completion in completions])
    logprobs = np.concatenate([completion.logprobs for completion in completions])
    weights = np.concatenate([weight for group in groups for weight in group.weights])
    return Targets(
        tokens=index_tensor(tokens, device),
        logprobs=torch.from_numpy(logprobs).to(device),
        weights=torch.from_numpy(weights).to(device),
    )


def _images(prompts: Sequence[Prompt], longest: int) -> NDArray[np.int64] | None:
    """The image number of each prompt token [B, P], -1 for text; None if no prompt has an image.

    Consecutive image tokens are one image, as in transformers.
    """
    if not any(len(prompt.visual.index) for prompt in prompts):
        return None
    images = np.full((len(prompts), longest), -1, dtype=np.int64)
    for row, prompt in zip(images, prompts, strict=True):
        index = np.sort(prompt.visual.index)
        row[index] = np.cumsum(np.diff(index, prepend=-2) > 1)
    return images
