"""The trunk: vision tower, prompt stream, completion stream, and the hidden states of exactly the rows that predict.

Legend: see `batch`. Nothing here evaluates: under `mx.vjp` it is one traced function of the parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import mlx.core as mx
from mlx.nn.utils import checkpoint

from opd.types import Prompt
from opd_mlx.batch import Batch, Prefixes, Step
from opd_mlx.layers.layer import KeysValues, Layer, Own
from opd_mlx.model import Model

Memory: TypeAlias = list[KeysValues]
"""What every layer keeps of prompts for their completions."""

CHECKPOINT_ABOVE = 2 * 1024**3
"""Bytes of activations that a backward may hold; where a call is estimated above it, layers are computed again instead: all, and on a GPU
those whose activations do not fit in the memory that is free."""


def hidden_states(model: Model, batch: Batch, again: float = 0) -> mx.array:
    """Final hidden states [M, D] of exactly the rows that predict completion tokens.

    `again` is the share of layers, the first, that are computed again in the backward instead of keeping their activations.
    """
    return complete(model, batch, prefill(model, batch.prefixes, again), again)


def look(model: Model, prompts: Sequence[Prompt]) -> None:
    """Has a frozen tower see all images of `prompts` together, before these are divided among streams."""
    if model.known is not None:
        model.known.features(prompts)


def prefill(model: Model, prefixes: Prefixes, again: float = 0) -> Memory:
    """What completions need of all prompts' prefixes, for every layer: keys and values."""
    family, module = model.family, model.module
    hidden = family.embed(module, prefixes.tokens)
    features = model.known.features(prefixes.sources) if model.known is not None else family.features(module, prefixes.sources, again)
    if features:
        hidden[prefixes.visual_rows] = features[0].astype(hidden.dtype)
    rotary = family.angles(module, prefixes.positions, hidden.dtype)
    masks = {rule: prefixes.mask(rule) for rule in {layer.rule for layer in model.layers}}
    found = []
    for number, layer in enumerate(model.layers):
        last = number == len(model.layers) - 1

        def run(hidden: mx.array, angles: KeysValues, layer: Layer = layer, last: bool = last) -> tuple[mx.array, KeysValues]:
            return layer.prefix(hidden, angles, prefixes, masks[layer.rule], last)

        hidden, keys_values = (checkpoint(layer.module, run) if number < again * len(model.layers) else run)(hidden, rotary[layer.rotary])
        found.append(keys_values)
        if number + 1 < len(features):
            hidden = hidden.at[prefixes.visual_rows].add(features[number + 1].astype(hidden.dtype))
    return found


def complete(model: Model, batch: Batch, memory: Memory, again: float = 0, own: Sequence[Own] = (), step: Step | None = None) -> mx.array:
    """Final hidden states [M, D] of the batch's `rows`, over the `memory` that `prefill` gave of its prompts.

    In a token `step` of decoding, rows are one token of each completion, after those of which the layers keep their `own`.
    """
    family, module = model.family, model.module
    hidden = family.embed(module, batch.tokens)
    rotary = family.angles(module, batch.positions, hidden.dtype)
    rules, rows = {layer.rule for layer in model.layers}, mx.arange(batch.shape[2])[:, None]
    masks = {rule: step.masks(batch.prefixes, rule) if step else batch.prefixes.masks(rule, rows, len(rows)) for rule in rules}
    for number, layer in enumerate(model.layers):

        def run(hidden: mx.array, angles: KeysValues, prefix: KeysValues, number: int = number, layer: Layer = layer) -> mx.array:
            return layer.completion(hidden, angles, batch.shape, prefix, masks[layer.rule], own[number] if step else None, step)

        its = number < again * len(model.layers)
        hidden = (checkpoint(layer.module, run) if its else run)(hidden, rotary[layer.rotary], memory[number])
    out: mx.array = family.text(module).norm(hidden if batch.rows is None else hidden[batch.rows])
    return out
