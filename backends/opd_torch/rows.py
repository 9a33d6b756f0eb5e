"""Runs models without a family file: each completion is a separate row of transformers' forward.

This is exact, and costs n times the work of a group. The model gets the prompt's positions and the
image arrays of the model's processor. `module` is transformers' model.

Legend: M completion tokens, R completions of all prompts, T tokens of a completion, D hidden width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.errors import ModelError
from opd.models import adapters
from opd.types import Prompt
from opd_torch.batch import Batch, Prefixes
from opd_torch.layers.layer import checkpoint_if

IMAGE = ("image_token_id", "image_token_index")
"""The names that configurations use for the id of image tokens."""

TOLERANCE = 0.05
"""Hidden states disagree above this relative difference; bfloat16's rounding stays below it."""


def check(module: Any, where: str) -> None:
    """Raises ModelError unless the model can run by rows.

    The divergence computes logits as the product of hidden states and head, so the model must do
    the same. Positions must count up. No row may attend to a later row, since otherwise a prompt's
    rows would depend on the completion.
    """
    if not hasattr(module, "lm_head") or not hasattr(module, "model"):
        raise _refused(where, "its head is not where other models have it")
    if hasattr(module.model, "get_rope_index"):
        raise _refused(where, "its positions have several axes")
    names = (getattr(module.config, key, None) for key in IMAGE)
    image = next((int(name) for name in names if isinstance(name, int)), 3)
    ids = torch.tensor([[1, 2, image, image, 3, 4, 5, 6]], device=module.lm_head.weight.device)
    places = torch.arange(ids.shape[1], device=ids.device)[None]

    def hidden(end: int, **positions: Tensor) -> Tensor:
        out = module.model(input_ids=ids[:, :end], use_cache=False, **positions)
        states: Tensor = out.last_hidden_state
        return states

    with torch.no_grad():
        logits = module(input_ids=ids, use_cache=False).logits
        plain = hidden(8)
        counted, first = hidden(8, position_ids=places), hidden(5, position_ids=places[:, :5])
    product = torch.nn.functional.linear(plain, module.lm_head.weight)
    if not torch.allclose(logits, product, rtol=1e-4, atol=1e-4):
        raise _refused(where, "its logits are more than its head's product")
    if _differ(counted, plain):
        raise _refused(where, "its positions do not count up")
    if _differ(counted[:, :5], first):
        raise _refused(where, "its tokens see later ones")


def _differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).float().norm() > TOLERANCE * b.float().norm())


def _refused(where: str, why: str) -> ModelError:
    return ModelError(f"{where}: this architecture has no family file, and {why}")


def freeze_vision(module: Any, where: str) -> None:
    """Freezes everything but the language model and the head.

    Raises ModelError if no parameter's name shows that it belongs to a language model.
    """
    language = {
        name for name, _ in module.named_parameters() if adapters.part_of_model(name) == "language"
    }
    if not language:
        raise _refused(where, "no name says what its language model is; set model.vision=true")
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in language or parameter is module.lm_head.weight)


def hidden_states(module: Any, batch: Batch) -> Tensor:
    """Final hidden states [M, D] of the rows that predict.

    The backward recomputes each completion, so it holds the activations of one at a time.
    """
    lengths = batch.ragged.lengths.tolist()
    tokens, positions = torch.split(batch.tokens, lengths), torch.split(batch.positions, lengths, 1)
    sources = [batch.prefixes.sources[owner] for owner in batch.owner.index.tolist()]
    rows = zip(sources, tokens, positions, strict=True)
    return torch.cat([checkpoint_if(True, _row, module, *row) for row in rows if len(row[1])])


def prefill(module: Any, prefixes: Prefixes) -> list[Any]:
    """Runs each prompt's prefix; returns transformers' cache of each."""
    positions = torch.split(prefixes.positions, prefixes.ragged.lengths.tolist(), 1)
    pairs = zip(prefixes.sources, positions, strict=True)
    return [_prefill(module, prompt, places) for prompt, places in pairs]


def begin(prompts: list[Any], n: int) -> list[Any]:
    """Copies each prompt's cache for each of n completions."""
    return [copy.deepcopy(cache) for cache in prompts for _ in range(n)]


def decode(module: Any, batch: Batch, completions: Sequence[Any]) -> Tensor:
    """Final hidden states [R, D] of the next row of every completion, over the caches
    `completions`.
    """
    hidden = []
    rows = zip(batch.tokens, batch.positions.unbind(1), completions, strict=True)
    for token, place, cache in rows:
        out = module.model(
            input_ids=token.view(1, 1),
            position_ids=_places(place[:, None]),
            past_key_values=cache,
            use_cache=True,
        )
        hidden.append(out.last_hidden_state[:, -1])
    return torch.cat(hidden)


def _prefill(module: Any, prompt: Prompt, positions: Tensor) -> Any:
    ids = torch.from_numpy(prompt.tokens[:-1].astype(np.int64)).to(positions.device)
    out = module.model(
        input_ids=ids[None],
        position_ids=_places(positions),
        use_cache=True,
        **_images(prompt, module),
    )
    return out.past_key_values


def _row(module: Any, prompt: Prompt, tokens: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [T, D] of one completion's rows, computed together with the whole prompt."""
    start = torch.from_numpy(prompt.tokens[:-1].astype(np.int64)).to(tokens.device)
    before = torch.from_numpy(prompt.positions[:, :-1].astype(np.int64)).to(tokens.device)
    out = module.model(
        input_ids=torch.cat([start, tokens])[None],
        position_ids=_places(torch.cat([before, positions], 1)),
        use_cache=False,
        **_images(prompt, module),
    )
    hidden: Tensor = out.last_hidden_state[0, -len(tokens) :]
    return hidden


def _places(positions: Tensor) -> Tensor:
    return positions if len(positions) == 1 else positions[:, None]


def _images(prompt: Prompt, module: Any) -> dict[str, Tensor]:
    weight = module.lm_head.weight
    arrays = {
        name: torch.from_numpy(np.ascontiguousarray(value)).to(weight.device)
        for name, value in prompt.images.items()
    }
    return {
        name: value.to(weight.dtype) if value.is_floating_point() else value.long()
        for name, value in arrays.items()
    }
