"""Models without a family file: every completion is a row of its own through the model's own forward. Exact, and n times the work.

The prompt's positions are given to the model; image arrays are given as its processor made them.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd.errors import ModelError
from opd.models import adapters
from opd.types import Prompt
from opd_torch.batch import Batch, Prefixes
from opd_torch.vision import computed

IMAGE = ("image_token_id", "image_token_index")
"""What configurations call the token that image features replace."""


APART = 0.05
"""Relative difference of hidden states above which two ways of computing them are not the same; bfloat16 stays below."""


def check(model: Any, where: str) -> None:
    """Raises ModelError unless the model can run by rows.

    Its logits must be the head times the hidden states, which is all that the divergence computes with; its positions must count up; and no
    row may see a later one, or a prompt's would not be the same before every completion.
    """
    if not hasattr(model, "lm_head") or not hasattr(model, "model"):
        raise _refused(where, "its head is not where other models have it")
    if hasattr(model.model, "get_rope_index"):
        raise _refused(where, "its positions have several axes")
    image = next((int(found) for key in IMAGE if isinstance(found := getattr(model.config, key, None), int)), 3)
    ids = torch.tensor([[1, 2, image, image, 3, 4, 5, 6]], device=model.lm_head.weight.device)
    places = torch.arange(ids.shape[1], device=ids.device)[None]

    def hidden(end: int, **more: Tensor) -> Tensor:
        found: Tensor = model.model(input_ids=ids[:, :end], use_cache=False, **more).last_hidden_state
        return found

    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        own, ours, first = hidden(8), hidden(8, position_ids=places), hidden(5, position_ids=places[:, :5])
    if not torch.allclose(logits, torch.nn.functional.linear(own, model.lm_head.weight), rtol=1e-4, atol=1e-4):
        raise _refused(where, "its logits are more than its head's product")
    if _apart(ours, own):
        raise _refused(where, "its positions do not count up")
    if _apart(ours[:, :5], first):
        raise _refused(where, "its tokens see later ones")


def _apart(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).float().norm() > APART * other.float().norm())


def _refused(where: str, why: str) -> ModelError:
    return ModelError(f"{where}: this architecture has no family file, and {why}")


def freeze_vision(model: Any, where: str) -> None:
    """Leaves the language model and the head to train. Raises ModelError where no name tells what the language model is."""
    language = {name for name, _ in model.named_parameters() if adapters.part(name) == "language"}
    if not language:
        raise _refused(where, "no name says what its language model is; set model.vision=true")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in language or parameter is model.lm_head.weight)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    """Final hidden states [M, D] of the rows that predict; each completion is computed again in the backward, so one is held at a time."""
    lengths = batch.ragged.lengths.tolist()
    parts = zip(batch.tokens.split(lengths), batch.positions.split(lengths, 1), batch.owner.index.tolist(), strict=True)
    return torch.cat([computed(True, _row, model, batch.prefixes.sources[owner], *part) for *part, owner in parts if len(part[0])])


def prefill(model: Any, prefixes: Prefixes) -> list[Any]:
    """The model's own cache of each prompt's prefix."""
    places = prefixes.positions.split(prefixes.ragged.lengths.tolist(), 1)
    found = []
    for prompt, positions in zip(prefixes.sources, places, strict=True):
        ids = torch.from_numpy(prompt.tokens[:-1].astype(np.int64)).to(positions.device)
        out = model.model(input_ids=ids[None], position_ids=_places(positions), use_cache=True, **_images(prompt, model))
        found.append(out.past_key_values)
    return found


def decode(model: Any, tokens: Tensor, positions: Tensor, memory: list[Any], own: list[Any]) -> Tensor:
    """Final hidden states [R, D] of one more row of every completion, each with a cache of its own."""
    if not own:
        own += [copy.deepcopy(cache) for cache in memory for _ in range(len(tokens) // len(memory))]
    rows = [
        model.model(input_ids=token.view(1, 1), position_ids=_places(place[:, None]), past_key_values=cache, use_cache=True)
        for token, place, cache in zip(tokens, positions.unbind(1), own, strict=True)
    ]
    return torch.cat([out.last_hidden_state[:, -1] for out in rows])


def _row(model: Any, prompt: Prompt, tokens: Tensor, positions: Tensor) -> Tensor:
    """Hidden states [T, D] of one completion's rows, behind the whole prompt."""
    start = torch.from_numpy(prompt.tokens[:-1].astype(np.int64)).to(tokens.device)
    before = torch.from_numpy(prompt.positions[:, :-1].astype(np.int64)).to(tokens.device)
    out = model.model(
        input_ids=torch.cat([start, tokens])[None],
        position_ids=_places(torch.cat([before, positions], 1)),
        use_cache=False,
        **_images(prompt, model),
    )
    hidden: Tensor = out.last_hidden_state[0, -len(tokens) :]
    return hidden


def _places(positions: Tensor) -> Tensor:
    return positions if len(positions) == 1 else positions[:, None]


def _images(prompt: Prompt, model: Any) -> dict[str, Tensor]:
    weight = model.lm_head.weight
    arrays = {name: torch.from_numpy(np.ascontiguousarray(value)).to(weight.device) for name, value in prompt.images.items()}
    return {name: value.to(weight.dtype) if value.is_floating_point() else value.long() for name, value in arrays.items()}
