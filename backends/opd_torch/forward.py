"""The trunk: vision tower, prompt stream, completion stream, and the hidden states of exactly the rows that predict.

Legend: see `batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_torch.attention import KeysValues, Own, completion_layer, decode_layer, prefix_layer, rotary
from opd_torch.batch import Batch, Prefixes
from opd_torch.vision import visual_features

CHECKPOINT_ABOVE = 2 * 1024**3
"""Bytes of activations that a backward may hold; where a call is estimated above it, each layer is computed again instead."""


def hidden_states(model: Any, batch: Batch, again: bool = False) -> Tensor:
    """Final hidden states [M, D] of exactly the rows that predict completion tokens; `again` computes layers again in the backward."""
    prefix = prefill(model, batch.prefixes, again)
    text = model.model.language_model
    hidden = text.embed_tokens(batch.tokens)
    angles = rotary(text, batch.positions, hidden)
    for layer, (key, value) in zip(text.layers, prefix, strict=True):
        hidden = _run(again, completion_layer, layer, hidden, angles, key, value, batch.ragged, batch.owner, batch.mask)
    out: Tensor = text.norm(hidden)
    return out


def prefill(model: Any, prefixes: Prefixes, again: bool = False) -> list[KeysValues]:
    """Keys and values of all prompts' prefixes, for every layer."""
    text = model.model.language_model
    hidden = text.embed_tokens(prefixes.tokens)
    if model.known is not None:
        features = model.known.features(prefixes.sources)
    else:
        features = visual_features(model.model.visual, prefixes.sources, again)
    if features:
        hidden = hidden.index_copy(0, prefixes.visual_rows, features[0].to(hidden.dtype))
    angles = rotary(text, prefixes.positions, hidden)
    found = []
    for number, layer in enumerate(text.layers):
        last = number + 1 == len(text.layers)
        hidden, key, value = _run(again, prefix_layer, layer, hidden, angles, prefixes.ragged, last)
        found.append((key, value))
        if number + 1 < len(features) and not last:
            hidden = hidden.index_add(0, prefixes.visual_rows, features[number + 1].to(hidden.dtype))
    return found


def decode(model: Any, tokens: Tensor, positions: Tensor, prefix: list[KeysValues], mask: Tensor | None, own: list[Own]) -> Tensor:
    """Final hidden states [R, D] of one more row of every completion: `tokens` [R] at `positions` [3, R], after those in `own`."""
    text = model.model.language_model
    hidden = text.embed_tokens(tokens)
    angles = rotary(text, positions, hidden)
    for layer, keys_values, mine in zip(text.layers, prefix, own, strict=True):
        hidden = decode_layer(layer, hidden, angles, keys_values, mask, mine)
    out: Tensor = text.norm(hidden)
    return out


def activation_bytes(model: Any, batch: Batch, itemsize: int) -> int:
    """Bytes that a backward holds, roughly: what each layer's products keep, of text and of images."""
    text, vision = model.config.text_config, model.config.vision_config
    a_row = 12 * text.hidden_size + 4 * text.intermediate_size + 8 * text.num_attention_heads * text.head_dim
    a_patch = 16 * vision.hidden_size + 4 * vision.intermediate_size
    patches = sum(len(prompt.images["pixel_values"]) for prompt in batch.prefixes.sources if prompt.images)
    rows = len(batch.prefixes.tokens) + len(batch.tokens)
    return int(itemsize * (text.num_hidden_layers * rows * a_row + vision.depth * patches * a_patch))


def _run(again: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls `function`, and in the backward once more instead of keeping its activations, if `again`."""
    return checkpoint(function, *arguments, use_reentrant=False) if again and torch.is_grad_enabled() else function(*arguments)
