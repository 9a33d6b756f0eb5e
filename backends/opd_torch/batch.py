"""Lays out prompts and completions of unequal lengths and counts as device arrays, and takes results apart again.

A prompt's last token predicts its completions' first tokens, so it runs with the completions: row t of a completion holds the token
before target t. What is left of the prompt is a prefix whose keys and values are all that is wanted of it, and a completion's last
token, which predicts nothing, is no input. Rows are packed without padding, so that no layer but attention computes on any.

Legend: B prompts, N tokens of all prefixes, P of the longest, R completions of all prompts, M completion tokens, T of the longest
completion, S visual tokens.
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
class Reach:
    """Which keys a row of an attention layer may attend to: those of tokens before it, and its own.

    `window`: only the last so many, itself included; None for all. `blocks`: the tokens of an image in a prompt also attend to those
    after them in the same image.
    """

    window: int | None = None
    blocks: bool = False


@dataclass(frozen=True)
class Prefixes:
    """Prompts without their last tokens: `tokens` [N], `positions` [axes, N], and how they are cut (`ragged`).

    `visual_rows` [S] are the packed image tokens, in the order of `sources`. Masks are made when a layer first asks for them.
    """

    sources: Sequence[Prompt]
    tokens: Tensor
    positions: Tensor
    ragged: Ragged
    visual_rows: Tensor
    _masks: dict[Reach, Tensor | None] = field(default_factory=dict)
    _bias: dict[torch.dtype, Tensor | None] = field(default_factory=dict)

    def mask(self, reach: Reach) -> Tensor | None:
        """Where a prompt's rows may attend, [B or 1, 1, P, P]; None where that is every earlier key."""
        if reach not in self._masks:
            place = torch.arange(self.ragged.longest, device=self.tokens.device)
            behind = place[:, None] - place
            images = _images(self.sources, self.ragged.longest) if reach.blocks else None
            window = reach.window if reach.window is not None and reach.window < self.ragged.longest else None
            allowed = (behind >= 0)[None, None]
            if images is not None:
                its = torch.from_numpy(images).to(place.device)[:, None]
                allowed = allowed | ((its[..., :, None] == its[..., None, :]) & (its >= 0)[..., None])
            if window is not None:
                allowed = allowed & (behind < window)
            # Padding stands at the end, where causality alone keeps it from every real row.
            self._masks[reach] = None if window is None and images is None else allowed
        return self._masks[reach]

    def seen(self, reach: Reach, rows: Tensor, count: int) -> Tensor | None:
        """Which keys of its prompt the `rows` [T, 1] of a completion attend to, all of them below `count`: [B, 1, T or 1, P]; None for all.

        The first row of a completion stands right behind its prompt's prefix.
        """
        window = reach.window if reach.window is not None and reach.window < self.ragged.longest + count else None
        if window is None:
            return None if self.ragged.even else self._real
        behind = self.ragged.counts[:, None, None, None] + rows - torch.arange(self.ragged.longest, device=rows.device)
        return self._real & (behind < window)

    def bias(self, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of a prompt's keys [B, 1, 1, P]: 0, and minus infinity for padding; None where there is none."""
        if dtype not in self._bias:
            real = None if self.ragged.even else torch.zeros_like(self._real, dtype=dtype).masked_fill_(~self._real, float("-inf"))
            self._bias[dtype] = real
        return self._bias[dtype]

    def select(self, prompts: NDArray[np.int64]) -> Prefixes:
        """Some of the prompts, as wide as all were, since that is how layers keep them."""
        its = lay_out_prefixes([self.sources[prompt] for prompt in prompts], self.tokens.device)
        return replace(its, ragged=Ragged(its.ragged.lengths, self.tokens.device, self.ragged.longest))

    @cached_property
    def _real(self) -> Tensor:
        """Where there is a key and no padding, [B, 1, 1, P]."""
        return torch.arange(self.ragged.longest, device=self.tokens.device) < self.ragged.counts[:, None, None, None]


@dataclass(frozen=True)
class Step:
    """One token step of decoding: its `number` [1], on the device, and of how many own rows every layer reads keys.

    `count` is number + 1, or more where `exact` is false: then a device that runs one recorded step again and again reads as much in each.
    """

    number: Tensor
    count: int
    exact: bool
    _masks: dict[Reach, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    def masks(self, prefixes: Prefixes, reach: Reach) -> tuple[Tensor | None, Tensor | None]:
        """Which keys of its prompt [B, 1, 1, P] and which of its own [count] a completion's row attends to; None for all."""
        if reach not in self._masks:
            behind = self.number - torch.arange(self.count, device=self.number.device)
            own = None if self.exact else behind >= 0
            if reach.window is not None and reach.window < self.count:
                own = behind < reach.window if own is None else own & (behind < reach.window)
            self._masks[reach] = prefixes.seen(reach, self.number[:, None], self.count), own
        return self._masks[reach]


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward: `prefixes`, and completion rows: `tokens` [M], `positions` [axes, M], and how they are cut (`ragged`).

    Every completion row has a target; rows are in order of group, completion and token, so all of a prompt stand together (`prompts`).
    Masks are made when a layer first asks.
    """

    prefixes: Prefixes
    tokens: Tensor
    positions: Tensor
    ragged: Ragged
    prompts: Ragged
    owner: Owner
    _masks: dict[Reach, Tensor] = field(default_factory=dict)

    def mask(self, reach: Reach) -> Tensor:
        """Which keys [prefix | own] each completion row may attend to: [R or 1, 1, T, P + T]."""
        if reach not in self._masks:
            length = self.ragged.longest
            place = torch.arange(length, device=self.tokens.device)
            behind = place[:, None] - place
            own = ((behind >= 0) if reach.window is None else (behind >= 0) & (behind < reach.window))[None, None]
            seen = self.prefixes.seen(reach, place[:, None], length)
            if seen is None:
                self._masks[reach] = torch.cat([own.new_ones(1, 1, length, self.prefixes.ragged.longest), own], -1)
            else:
                spread = self.owner.spread(seen).expand(-1, -1, length, -1)
                self._masks[reach] = torch.cat([spread, own.expand(len(spread), -1, -1, -1)], -1)
        return self._masks[reach]


@dataclass(frozen=True)
class Targets:
    """Completion tokens, their log-probabilities as recorded, and their weights, [M] each."""

    tokens: Tensor
    logprobs: Tensor
    weights: Tensor


def lay_out_prefixes(prompts: Sequence[Prompt], device: torch.device, multiple: int = 1) -> Prefixes:
    """Packs `prompts` without their last tokens; the longest is padded to a `multiple` of tokens where attention pads."""
    lengths = np.array([len(prompt) - 1 for prompt in prompts], dtype=np.int64)
    for prompt, length in zip(prompts, lengths, strict=True):
        if length < 1 or length in prompt.visual.index:
            raise ValueError("a prompt has at least two tokens, and its last is not an image token")
    visual = [prompt.visual.index + start for prompt, start in zip(prompts, np.cumsum(lengths) - lengths, strict=True)]
    return Prefixes(
        sources=prompts,
        tokens=index_tensor(np.concatenate([prompt.tokens[:-1] for prompt in prompts]), device),
        positions=index_tensor(np.concatenate([prompt.positions[:, :-1] for prompt in prompts], axis=1), device),
        ragged=Ragged(lengths, device, -(-int(lengths.max()) // multiple) * multiple),
        visual_rows=index_tensor(np.concatenate(visual), device),
    )


def lay_out(prompts: Sequence[Prompt], completions: Sequence[Sequence[IntArray]], device: torch.device) -> Batch:
    """Packs `prompts` and the tokens of each one's `completions`, of which at least one is not empty."""
    return lay_out_completions(lay_out_prefixes(prompts, device), completions)


def lay_out_completions(prefixes: Prefixes, completions: Sequence[Sequence[IntArray]]) -> Batch:
    """Packs the tokens of each prompt's `completions`, of which at least one is not empty, behind prompts that are laid out already."""
    device = prefixes.tokens.device
    flat = [(prompt, tokens) for prompt, members in zip(prefixes.sources, completions, strict=True) for tokens in members]
    inputs = [np.append(prompt.tokens[-1:], tokens[:-1]) for prompt, tokens in flat if len(tokens)]
    positions = [prompt.row_positions(len(tokens)) for prompt, tokens in flat if len(tokens)]
    return Batch(
        prefixes=prefixes,
        tokens=index_tensor(np.concatenate(inputs), device),
        positions=index_tensor(np.concatenate(positions, axis=1), device),
        ragged=Ragged(np.array([len(tokens) for _, tokens in flat], dtype=np.int64), device),
        prompts=Ragged(np.array([sum(map(len, members)) for members in completions], dtype=np.int64), device),
        owner=Owner([len(members) for members in completions], device),
    )


def lay_out_targets(groups: Sequence[Group], device: torch.device) -> Targets:
    """Everything about completion tokens that is the same for both policies."""
    completions = [completion for group in groups for completion in group.completions]
    weights = [weight for group in groups for weight in group.weights]
    return Targets(
        tokens=index_tensor(np.concatenate([completion.tokens for completion in completions]), device),
        logprobs=torch.from_numpy(np.concatenate([completion.logprobs for completion in completions])).to(device),
        weights=torch.from_numpy(np.concatenate(weights)).to(device),
    )


def _images(prompts: Sequence[Prompt], longest: int) -> NDArray[np.int64] | None:
    """Of each token [B, P] of the prompts the image it belongs to, -1 for text; None where there is no image.

    Image tokens that stand without a gap are one image, as transformers has it.
    """
    if not any(len(prompt.visual.index) for prompt in prompts):
        return None
    images = np.full((len(prompts), longest), -1, dtype=np.int64)
    for row, prompt in zip(images, prompts, strict=True):
        index = np.sort(prompt.visual.index)
        row[index] = np.cumsum(np.diff(index, prepend=-2) > 1)
    return images
