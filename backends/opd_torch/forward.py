"""The forward of the trunk: vision tower, prompt stream, completion stream.

It computes the final hidden states of the rows that predict, and of no others. Legend: see `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import FloatArray, IntArray, Prompt
from opd_torch import rows
from opd_torch.batch import Batch, DecodeStep, Prefixes, lay_out
from opd_torch.layers.layer import CompletionCache, KeysValues, checkpoint_if
from opd_torch.model.load import Model

PromptCache: TypeAlias = list[KeysValues]
"""The cache of all prompts, layer by layer. Without a family file decoding uses transformers' cache
of each prompt instead.
"""


def hidden_states(model: Model, batch: Batch, recompute: float = 0) -> Tensor:
    """Final hidden states [M, D] of the rows that predict completion tokens.

    `recompute` is the share of layers, counted from the first, that the backward recomputes.
    """
    return complete(model, batch, prefill(model, batch.prefixes, recompute), recompute)


def prefill(model: Model, prefixes: Prefixes, recompute: float = 0) -> PromptCache:
    """Runs all prompts' prefixes and returns their cache.

    Without a family file the cache is empty, because every completion's row contains the prompt.
    """
    family = model.family
    if family is None:
        return []
    hidden = family.embed(model.module, prefixes.tokens)
    features = _features(model, prefixes.sources, recompute)
    if features:
        hidden = hidden.index_copy(0, prefixes.visual_rows, features[0].to(hidden.dtype))
    angles = family.angles(model.module, prefixes.positions, hidden)
    cache = []
    for number, layer in enumerate(model.layers):
        last = number + 1 == len(model.layers)
        recompute_layer = number < recompute * len(model.layers)
        arguments = hidden, angles[layer.rotary], prefixes, last
        hidden, keys_values = checkpoint_if(recompute_layer, layer.prefix, *arguments)
        cache.append(keys_values)
        if number + 1 < len(features) and not last:
            added = features[number + 1].to(hidden.dtype)
            hidden = hidden.index_add(0, prefixes.visual_rows, added)
    return cache


def complete(model: Model, batch: Batch, prompts: PromptCache, recompute: float = 0) -> Tensor:
    """Final hidden states [M, D] of completion rows, over the cache of the prompts."""
    family = model.family
    if family is None:
        return rows.hidden_states(model.module, batch)
    hidden = family.embed(model.module, batch.tokens)
    angles = family.angles(model.module, batch.positions, hidden)
    for number, (layer, prefix) in enumerate(zip(model.layers, prompts, strict=True)):
        recompute_layer = number < recompute * len(model.layers)
        arguments = hidden, angles[layer.rotary], prefix, batch
        hidden = checkpoint_if(recompute_layer, layer.completion, *arguments)
    return family.text(model.module).norm(hidden)


def attend(
    model: Model, prompts: Sequence[Prompt], completions: Sequence[Sequence[IntArray]]
) -> list[list[FloatArray]]:
    """The attention [L, T, S] of each completion's rows to the visual tokens of its prompt,
    averaged over heads, for the L layers that have keys.
    """
    family, batch = model.family, lay_out(prompts, completions, model.device.torch)
    assert family is not None
    cache = prefill(model, batch.prefixes)
    hidden = family.embed(model.module, batch.tokens)
    angles = family.angles(model.module, batch.positions, hidden)
    layers = []
    for layer, prefix in zip(model.layers, cache, strict=True):
        weights = layer.visual_weights(hidden, angles[layer.rotary], prefix, batch)
        if weights is not None:
            layers.append([one.float().cpu().numpy() for one in weights])
        hidden = layer.completion(hidden, angles[layer.rotary], prefix, batch)
    stacked = (np.stack(one) for one in zip(*layers, strict=True))
    return [list(islice(stacked, len(members))) for members in completions]


def prefill_to_decode(model: Model, prefixes: Prefixes) -> PromptCache:
    """Runs `prefill`, or without a family file makes transformers' cache of each prompt."""
    if model.family is None:
        return rows.prefill(model.module, prefixes)
    return prefill(model, prefixes)


def begin(model: Model, prompts: PromptCache, n: int) -> list[Any]:
    """The caches of n completions of each prompt, before the first token."""
    if model.family is None:
        return rows.begin(prompts, n)
    return [layer.begin(prefix, n) for layer, prefix in zip(model.layers, prompts, strict=True)]


def decode(
    model: Model,
    batch: Batch,
    prompts: PromptCache,
    completions: Sequence[Any],
    step: DecodeStep,
) -> Tensor:
    """Final hidden states [R, D] of the next row of every completion, n to a prompt.

    `completions` are the caches that `begin` made. They hold the earlier rows, and the new rows are
    added to them in place.
    """
    family = model.family
    if family is None:
        return rows.decode(model.module, batch, completions)
    hidden = family.embed(model.module, batch.tokens)
    angles = family.angles(model.module, batch.positions, hidden)
    for layer, prefix, cache in zip(model.layers, prompts, completions, strict=True):
        hidden = layer.completion(hidden, angles[layer.rotary], prefix, batch, cache, step)
    return family.text(model.module).norm(hidden)


def concatenate_caches(model: Model, parts: list[PromptCache]) -> PromptCache:
    """Joins the caches of several calls of `prefill_to_decode`.

    Empties `parts` layer by layer, so that at most one layer is in memory twice.
    """
    if model.family is None:
        return list(chain.from_iterable(parts))
    return [layer.join([part.pop(0) for part in parts]) for layer in model.layers]


def select_rows(
    model: Model,
    prompts: PromptCache,
    completions: Sequence[Any],
    chosen: NDArray[np.int64],
    completion_rows: Tensor,
) -> tuple[PromptCache, Sequence[Any]]:
    """Selects the caches of the prompts `chosen` and of the completions `completion_rows`, of which
    every chosen prompt has the same number.
    """
    if model.family is None:
        selected = [completions[row] for row in completion_rows.tolist()]
        return [prompts[prompt] for prompt in chosen], selected
    if len(chosen) < len(prompts[0][0]):
        prompts = reorder(prompts, chosen.tolist())
    cache: CompletionCache
    for cache in completions:
        cache.select_rows(completion_rows)
    return prompts, completions


def reorder(cache: PromptCache, prompts: Sequence[int]) -> PromptCache:
    """Selects `prompts` from the cache, in the given order."""
    index = torch.tensor(prompts, device=cache[0][0].device)
    return [
        (first.index_select(0, index), second.index_select(0, index)) for first, second in cache
    ]


def _features(model: Model, prompts: Sequence[Prompt], recompute: float) -> list[Tensor]:
    """The image features of the prompts, through the feature cache if the tower is frozen."""
    family = model.family
    assert family is not None
    if model.feature_cache is None:
        return family.features(model.module, prompts, model.device, recompute)
    return model.feature_cache.features(
        prompts, lambda new: family.features(model.module, new, model.device, 0)
    )
