"""The forward of the trunk: vision tower, prompt stream, completion stream.

It computes the final hidden states of the rows that predict. Nothing is evaluated here, so under
`mx.vjp` the forward is one traced function of the parameters. Legend: see `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
import numpy as np

from opd.types import FloatArray, IntArray, Prompt
from opd_mlx.batch import Batch, DecodeStep, Masks, Prefixes, Visibility, lay_out
from opd_mlx.layers.layer import CompletionCache, KeysValues, Layer, checkpoint_if
from opd_mlx.model import Model

PromptCache: TypeAlias = list[KeysValues]
"""The cache of all prompts, layer by layer."""


def hidden_states(model: Model, batch: Batch, recompute: float = 0) -> mx.array:
    """Final hidden states [M, D] of the rows that predict completion tokens.

    `recompute` is the share of layers, counted from the first, that the backward recomputes.
    """
    return complete(model, batch, prefill(model, batch.prefixes, recompute), recompute)


def prefill(model: Model, prefixes: Prefixes, recompute: float = 0) -> PromptCache:
    """Runs all prompts' prefixes and returns their cache."""
    family, module = model.family, model.module
    hidden = family.embed(module, prefixes.tokens)
    features = model.features(prefixes.sources, recompute)
    if features:
        hidden[prefixes.visual_rows] = features[0].astype(hidden.dtype)
    angles = family.angles(module, prefixes.positions, hidden.dtype)
    kinds = {layer.visibility for layer in model.layers}
    masks = {visibility: prefixes.mask(visibility) for visibility in kinds}
    cache = []
    for number, layer in enumerate(model.layers):
        last = number == len(model.layers) - 1

        def run(
            hidden: mx.array, angles: KeysValues, layer: Layer = layer, last: bool = last
        ) -> tuple[mx.array, KeysValues]:
            return layer.prefix(hidden, angles, prefixes, masks[layer.visibility], last)

        run_layer = checkpoint_if(number < recompute * len(model.layers), layer.module, run)
        hidden, keys_values = run_layer(hidden, angles[layer.rotary])
        cache.append(keys_values)
        if number + 1 < len(features):
            added = features[number + 1].astype(hidden.dtype)
            hidden = hidden.at[prefixes.visual_rows].add(added)
    return cache


def complete(model: Model, batch: Batch, cache: PromptCache, recompute: float = 0) -> mx.array:
    """Final hidden states [M, D] of the batch's `rows`, over the `cache` of the prompts."""
    return _completions(model, batch, cache, recompute, (), None)


def attend(
    model: Model, prompts: Sequence[Prompt], completions: Sequence[Sequence[IntArray]]
) -> list[list[FloatArray]]:
    """The attention [L, T, S] of each completion's rows to the visual tokens of its prompt,
    averaged over heads, for the L layers that have keys.
    """
    warm(model, prompts)
    batch = lay_out(prompts, completions)
    hidden, angles, masks = _inputs(model, batch, None)
    layers = []
    for layer, prefix in zip(model.layers, prefill(model, batch.prefixes), strict=True):
        own, mask = angles[layer.rotary], masks[layer.visibility]
        weights = layer.visual_weights(hidden, own, prefix, batch, mask)
        if weights is not None:
            layers.append([np.array(one) for one in weights])
        hidden = layer.completion(hidden, own, batch.shape, prefix, mask, None, None)
    return [
        [np.stack([rows[place, : len(tokens)] for rows in some]) for place, tokens in members]
        for some, members in zip(
            zip(*layers, strict=True), map(enumerate, completions), strict=True
        )
    ]


def decode(
    model: Model,
    batch: Batch,
    cache: PromptCache,
    caches: Sequence[CompletionCache],
    step: DecodeStep,
) -> mx.array:
    """Final hidden states [B * n, D] of the next row of every completion.

    `caches` hold the earlier rows, layer by layer; the new rows are added to them in place.
    """
    return _completions(model, batch, cache, 0, caches, step)


def select_rows(cache: PromptCache, prompts: mx.array) -> PromptCache:
    """Selects `prompts` [B'] from the cache."""
    return [(first[prompts], second[prompts]) for first, second in cache]


def concatenate_caches(model: Model, parts: list[PromptCache]) -> PromptCache:
    """Joins the caches of several calls of `prefill`.

    Empties `parts` layer by layer, so that at most one layer is in memory twice.
    """
    if len(parts) == 1:
        return parts[0]
    whole: PromptCache = []
    for layer in model.layers:
        whole.append(layer.join([part.pop(0) for part in parts]))
        mx.eval(whole[-1])
    return whole


def warm(model: Model, prompts: Sequence[Prompt]) -> None:
    """Fills the feature cache of a frozen tower with the images of `prompts`."""
    if model.feature_cache is not None:
        model.feature_cache.features(prompts)


def _completions(
    model: Model,
    batch: Batch,
    cache: PromptCache,
    recompute: float,
    caches: Sequence[CompletionCache],
    step: DecodeStep | None,
) -> mx.array:
    hidden, angles, masks = _inputs(model, batch, step)
    for number, layer in enumerate(model.layers):

        def run(
            hidden: mx.array,
            angles: KeysValues,
            prefix: KeysValues,
            number: int = number,
            layer: Layer = layer,
        ) -> mx.array:
            layer_cache = caches[number] if step else None
            mask = masks[layer.visibility]
            return layer.completion(hidden, angles, batch.shape, prefix, mask, layer_cache, step)

        run_layer = checkpoint_if(number < recompute * len(model.layers), layer.module, run)
        hidden = run_layer(hidden, angles[layer.rotary], cache[number])
    norm = model.family.text(model.module).norm
    return norm(hidden if batch.rows is None else hidden[batch.rows])


def _inputs(
    model: Model, batch: Batch, step: DecodeStep | None
) -> tuple[mx.array, tuple[KeysValues, ...], dict[Visibility, Masks]]:
    """Embeddings and rotary factors of completion rows, and their masks by visibility."""
    family, module = model.family, model.module
    hidden = family.embed(module, batch.tokens)
    angles = family.angles(module, batch.positions, hidden.dtype)
    rows, length = mx.arange(batch.shape[2])[:, None], batch.shape[2]
    masks = {
        visibility: step.masks(batch.prefixes, visibility)
        if step
        else batch.prefixes.masks(visibility, rows, length)
        for visibility in {layer.visibility for layer in model.layers}
    }
    return hidden, angles, masks
