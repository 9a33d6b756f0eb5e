"""The trunk: vision tower, prompt stream, completion stream, and the hidden states of exactly the rows that predict.

Legend: see `batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd_torch import rows
from opd_torch.batch import Batch, Prefixes, Step
from opd_torch.vision import computed

Memory: TypeAlias = tuple[Tensor, Tensor]
"""What a layer keeps of the prompts: keys and values, or what another kind of layer hands on; [B, ...] each."""


def hidden_states(model: Any, batch: Batch, again: float = 0) -> Tensor:
    """Final hidden states [M, D] of exactly the rows that predict completion tokens.

    `again` is the share of layers, the first, that are computed again in the backward instead of keeping their activations.
    """
    return complete(model, batch, remember(model, batch.prefixes, again), again)


def remember(model: Any, prefixes: Prefixes, again: float = 0) -> list[Memory]:
    """`prefill` for `complete`; nothing without a family, where every completion reads its prompt by itself."""
    return [] if model.family is None else prefill(model, prefixes, again)


def complete(model: Any, batch: Batch, memory: list[Memory], again: float = 0) -> Tensor:
    """Final hidden states [M, D] of completion rows over what their prompts left."""
    family = model.family
    if family is None:
        return rows.hidden_states(model, batch)
    text = family.language(model)
    hidden = text.embed_tokens(batch.tokens)
    angles = family.angles(text, batch.positions, hidden)
    for number, (layer, its_angles, prefix) in enumerate(zip(text.layers, angles, memory, strict=True)):
        its = number < again * len(text.layers)
        hidden = computed(its, family.mixer(layer).completion_layer, family, layer, hidden, its_angles, prefix, batch)
    out: Tensor = text.norm(hidden)
    return out


def prefill(model: Any, prefixes: Prefixes, again: float = 0) -> list[Memory]:
    """What every layer keeps of all prompts' prefixes; without a family, the caches of the prompts."""
    family = model.family
    if family is None:
        return rows.prefill(model, prefixes)
    text = family.language(model)
    hidden = text.embed_tokens(prefixes.tokens)
    if model.known is not None:
        features = model.known.features(prefixes.sources, lambda prompts: family.features(model, prompts, False))
    else:
        features = family.features(model, prefixes.sources, again)
    if features:
        hidden = hidden.index_copy(0, prefixes.visual_rows, features[0].to(hidden.dtype))
    angles = family.angles(text, prefixes.positions, hidden)
    found = []
    for number, layer in enumerate(text.layers):
        last, its = number + 1 == len(text.layers), number < again * len(text.layers)
        hidden, memory = computed(its, family.mixer(layer).prefix_layer, family, layer, hidden, angles[number], prefixes, last)
        found.append(memory)
        if number + 1 < len(features) and not last:
            hidden = hidden.index_add(0, prefixes.visual_rows, features[number + 1].to(hidden.dtype))
    return found


def decode(model: Any, tokens: Tensor, positions: Tensor, memory: list[Memory], prefixes: Prefixes, own: list[Any], step: Step) -> Tensor:
    """Final hidden states [R, D] of one more row of every completion: `tokens` [R] at `positions` [axes, R], after those in `own`.

    `own` is what the layers keep of the completions themselves; an empty list before the first row.
    """
    family = model.family
    if family is None:
        return rows.decode(model, tokens, positions, memory, own)
    text = family.language(model)
    hidden = text.embed_tokens(tokens)
    angles = family.angles(text, positions, hidden)
    own += [family.mixer(layer).Own() for layer in text.layers[len(own) :]]
    for layer, its_angles, prefix, mine in zip(text.layers, angles, memory, own, strict=True):
        hidden = family.mixer(layer).decode_layer(family, layer, hidden, its_angles, prefix, prefixes, mine, step)
    out: Tensor = text.norm(hidden)
    return out


def joined_memory(model: Any, parts: list[list[Memory]]) -> list[Memory]:
    """The memory of several runs of prompts as one, as decoding reads it. Takes `parts` apart, so that one layer at most is held twice."""
    if model.family is None:
        return list(chain.from_iterable(parts))
    return [tuple(map(_stacked, zip(*(part.pop(0) for part in parts), strict=True))) for _ in range(len(parts[0]))]


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[B, ...] of all parts' [b, ...], with zeros behind what is shorter than the longest.

    Prompts leave keys by tokens, and products want them by heads: else every token step would copy them all.
    """
    if len(tensors) == 1:
        return tensors[0].contiguous()
    sizes = [tensor.shape for tensor in tensors]
    out = tensors[0].new_zeros(sum(size[0] for size in sizes), *map(max, zip(*(size[1:] for size in sizes), strict=True)))
    for tensor, place in zip(tensors, out.split([size[0] for size in sizes]), strict=True):
        place[tuple(map(slice, tensor.shape))] = tensor
    return out


def narrowed(model: Any, memory: list[Memory], own: list[Any], prompts: NDArray[np.int64], rows: Tensor) -> tuple[list[Memory], list[Any]]:
    """Memory and `own` (see `decode`) of some prompts and of some completions, as many of each prompt."""
    if model.family is None:
        return [memory[prompt] for prompt in prompts], [own[row] for row in rows.tolist()]
    if len(prompts) < len(memory[0][0]):
        memory = reordered(memory, prompts.tolist())
    for mine in own:
        mine.select(rows)
    return memory, own


def reordered(memory: list[Memory], prompts: Sequence[int]) -> list[Memory]:
    """Memory of prompts in another order, or of some of them."""
    index = torch.tensor(prompts, device=memory[0][0].device)
    return [(first.index_select(0, index), second.index_select(0, index)) for first, second in memory]
