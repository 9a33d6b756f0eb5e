"""The trunk: vision tower, prompt stream, completion stream, and the hidden states of exactly the rows that predict.

Legend: see `batch`. Nothing here evaluates: under `mx.vjp` it is one traced function of the parameters.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.nn.utils import checkpoint

from opd_mlx.attention import KeysValues, Own, completion_layer, prefix_layer, rotary
from opd_mlx.batch import Batch, Prefixes
from opd_mlx.model import Model
from opd_mlx.vision import visual_features

CHECKPOINT_ABOVE = 2 * 1024**3
"""Bytes of activations that a backward may hold; where a call is estimated above it, each layer is computed again instead."""


def hidden_states(model: Model, batch: Batch, again: bool = False) -> mx.array:
    """Final hidden states [M, D] of exactly the rows that predict completion tokens; `again` computes layers again in the backward."""
    prefix = prefill(model, batch.prefixes, again)
    hidden = decode(model, batch.tokens, batch.positions, batch.shape, prefix, batch.prefixes.mask, again=again)
    return hidden[batch.rows]


def prefill(model: Model, prefixes: Prefixes, again: bool = False) -> list[KeysValues]:
    """Keys and values of all prompts' prefixes, for every layer."""
    language = model.module.language_model.model
    hidden = language.embed_tokens(prefixes.tokens)
    if model.known is not None:
        features = model.known.features(prefixes.sources)
    else:
        features = visual_features(model.module.vision_tower, prefixes.sources, again)
    if features:
        hidden[prefixes.visual_rows] = features[0].astype(hidden.dtype)
    angles = rotary(language, prefixes.positions, hidden.dtype)
    found = []
    for number, layer in enumerate(language.layers):
        last = number == len(language.layers) - 1

        def run(hidden: mx.array, angles: KeysValues, layer: Any = layer, last: bool = last) -> tuple[mx.array, KeysValues]:
            return prefix_layer(layer, hidden, angles, prefixes.shape, last)

        hidden, keys_values = (checkpoint(layer, run) if again else run)(hidden, angles)
        found.append(keys_values)
        if number + 1 < len(features):
            hidden = hidden.at[prefixes.visual_rows].add(features[number + 1].astype(hidden.dtype))
    return found


def decode(
    model: Model,
    tokens: mx.array,
    positions: mx.array,
    shape: tuple[int, int, int],
    prefix: list[KeysValues],
    mask: mx.array | None,
    own: list[Own] | None = None,
    again: bool = False,
) -> mx.array:
    """Hidden states [B * n * T, D], after the final norm, of completion rows; with `own`, one token after those it holds."""
    language = model.module.language_model.model
    hidden = language.embed_tokens(tokens)
    angles = rotary(language, positions, hidden.dtype)
    for number, layer in enumerate(language.layers):

        def run(hidden: mx.array, angles: KeysValues, prefix: KeysValues, number: int = number, layer: Any = layer) -> mx.array:
            return completion_layer(layer, hidden, angles, shape, prefix, mask, own[number] if own is not None else None)

        hidden = (checkpoint(layer, run) if again else run)(hidden, angles, prefix[number])
    out: mx.array = language.norm(hidden)
    return out


def activation_bytes(model: Model, batch: Batch) -> int:
    """Bytes that a backward holds, roughly: what each layer's products and softmax keep, of text and of images."""
    args, vision = model.module.language_model.args, model.module.config.vision_config
    prompts, width = batch.prefixes.shape
    count, length = batch.shape[1:]
    a_row = 6 * args.hidden_size + 3 * args.intermediate_size + 6 * args.num_attention_heads * args.head_dim
    scores = 2 * args.num_attention_heads * (width * width + count * length * (width + length))
    text = args.num_hidden_layers * prompts * (a_row * (width + count * length) + scores)
    sizes = [t * h * w for prompt in batch.prefixes.sources for t, h, w in prompt.images.get("image_grid_thw", np.zeros((0, 3))).tolist()]
    a_patch = 10 * vision.hidden_size + 3 * vision.intermediate_size
    images = vision.depth * sum(size * (a_patch + 2 * vision.num_heads * size) for size in sizes)
    return int(model.dtype.size * (text + images))
