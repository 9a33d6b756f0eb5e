"""Rollout: every prompt once, then all completions of all prompts in lockstep, one token at a time.

Legend: B prompts, n completions of a prompt, R = B * n, V vocabulary; B, n and R fall as completions end.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.method.rollout import completions
from opd.types import Completion, FloatArray, Prompt, Sampling
from opd_torch.batch import Prefixes, Step, lay_out_prefixes
from opd_torch.forward import Memory, decode, joined_memory, narrowed, prefill
from opd_torch.kernels.recorder import Recorder
from opd_torch.layers.attention import room
from opd_torch.objective import default_chunk, head_logits, operand

PREFILL_TOKENS = 16384
"""Tokens of prompts that run together, so that many prompts can decode together without their layers' peak."""

ASK_EVERY = 8
"""Token steps between two questions of whether completions have ended, on a GPU, where each waits for all that is queued."""

ALIGNED = 64
"""Tokens of which prompts are padded to a multiple on a GPU, whose products of odd widths take several times as long."""

RECORDED = 256
"""Own rows of a completion that a recorded step reads at least: recording one takes as long as some ten steps of reading them."""

WORTH = 0.75
"""Completions that have ended leave the batch where no more than this share of its rows stays."""


def read(model: Any, prompts: Sequence[Prompt], device: torch.device) -> tuple[Prefixes, list[Memory]]:
    """All prompts laid out, and what every layer keeps of them.

    Longer ones come first in a batch; such as are less than half of the first that would run with them run apart, since attention pads.
    """
    parts: list[list[Prompt]] = []
    for prompt in prompts:
        if parts and sum(map(len, parts[-1])) + len(prompt) <= PREFILL_TOKENS and 2 * len(prompt) >= len(parts[-1][0]):
            parts[-1].append(prompt)
        else:
            parts.append([prompt])
    found = [prefill(model, lay_out_prefixes(part, device, align(device))) for part in parts]
    return lay_out_prefixes(prompts, device, align(device)), joined_memory(model, found)


def sample(
    model: Any, prefixes: Prefixes, memory: list[Memory], uniforms: FloatArray, sampling: Sampling, dtype: torch.dtype
) -> list[list[Completion]]:
    """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens]; the head computes in `dtype`.

    Raises FloatingPointError where logits are not finite.
    """
    tokens, logprobs = _lockstep(model, prefixes, memory, uniforms, sampling, dtype)
    return completions(tokens, logprobs, uniforms.shape[1], sampling.stop)


def _lockstep(
    model: Any, prefixes: Prefixes, memory: list[Memory], uniforms: FloatArray, sampling: Sampling, dtype: torch.dtype
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens and log-probabilities [R, steps], until every completion has ended; what stands behind a stop token means nothing.

    Raises FloatingPointError where logits are not finite.
    """
    count, n, limit = uniforms.shape
    head = model.lm_head.weight
    device = head.device
    head = operand(head.to(dtype))
    draws = torch.from_numpy(uniforms.reshape(count * n, limit)).to(device)
    banned, stop = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (sampling.banned, sampling.stop))
    # [axes, R, limit]; the first row is the prompt's last token.
    places = np.stack([prompt.row_positions(limit) for prompt in prefixes.sources], 1)
    positions = torch.from_numpy(places).to(device).repeat_interleave(n, 1)
    token = torch.tensor([prompt.tokens[-1] for prompt in prefixes.sources], device=device).repeat_interleave(n)
    tokens, logprobs = torch.zeros_like(draws, dtype=torch.int64), torch.zeros_like(draws)
    rows, own = torch.arange(count * n, device=device), list[Any]()
    ended = torch.zeros(count * n, dtype=torch.bool, device=device)
    finite = torch.ones(1, dtype=torch.bool, device=device)
    number = torch.zeros(1, dtype=torch.int64, device=device)
    recorder = Recorder(device, model)

    def advance(step: Step) -> None:
        """One token of every live row. All that it changes, it changes in place, so that a recorded step can be run again."""
        hidden = decode(model, token, positions.index_select(2, number)[..., 0], memory, prefixes, own, step)
        found, logprob = draw(hidden.to(dtype), head, draws.index_select(1, number)[:, 0], sampling.temperature, banned)
        tokens.index_put_((rows, number), found)
        logprobs.index_put_((rows, number), logprob)
        finite.logical_and_(logprob.isfinite().all())
        token.copy_(found)
        ended.logical_or_((found[:, None] == stop).any(1))
        number.add_(1)

    for done in range(1, limit + 1):
        own_keys = room(max(done, RECORDED)) if recorder.records else done
        recorder.run((len(rows), own_keys), partial(advance, Step(number, own_keys, exact=not recorder.records)))
        if asks(device, done - 1):
            known = torch.cat([ended, finite]).cpu().numpy()
            if not known[-1]:
                raise FloatingPointError
            live = ~known[:-1].reshape(len(prefixes.sources), -1)
            if not live.any():
                break
            prompts, members = _remaining(live)
            if len(prompts) * members.shape[1] <= WORTH * live.size:
                kept = torch.from_numpy((prompts[:, None] * live.shape[1] + members).ravel()).to(device)
                prefixes = prefixes.select(prompts)
                memory, own = narrowed(model, memory, own, prompts, kept)
                rows, token, ended, draws, positions = rows[kept], token[kept], ended[kept], draws[kept], positions[:, kept]
    if not finite:
        raise FloatingPointError
    return tokens[:, :done].cpu().numpy(), logprobs[:, :done].cpu().numpy()


def align(device: torch.device) -> int:
    """Of how many tokens a prompt's keys are a multiple."""
    return ALIGNED if device.type == "cuda" else 1


def asks(device: torch.device, step: int) -> bool:
    """Whether the host asks after this token step which completions have ended."""
    return device.type == "cpu" or step % ASK_EVERY == ASK_EVERY - 1


def _remaining(live: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of `live` [B, n]: the prompts that have a live completion [b], and of each as many completions as the most live ones, those first."""
    prompts = np.flatnonzero(live.any(1))
    order = np.argsort(~live[prompts], axis=1, kind="stable")
    return prompts, order[:, : live.sum(1).max()]


def draw(hidden: Tensor, head: Tensor, uniforms: Tensor, temperature: float, banned: Tensor) -> tuple[Tensor, Tensor]:
    """One token of every row and its log-probability, [R] each, from `hidden` [R, D], `head` [V, D] and `uniforms` [R]."""
    pieces = [
        _draw(head_logits(h, head), u, temperature, banned)
        for h, u in zip(*(x.split(default_chunk(len(head))) for x in (hidden, uniforms)), strict=True)
    ]
    tokens, logprobs = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor) -> tuple[Tensor, Tensor]:
    """The first id whose cumulative probability exceeds the uniform; at temperature 0 the likeliest id."""
    logits = logits.index_fill_(1, banned, float("-inf"))
    logits = logits.sub_(logits.amax(1, keepdim=True)).div_(temperature or 1.0)
    # Sums in float64: over a vocabulary float32 loses the rare ids.
    cumulative = logits.exp().cumsum(1, dtype=torch.float64)
    token = inverse_cdf(cumulative, uniforms) if temperature else logits.argmax(1)
    logprob = logits.gather(1, token[:, None])[:, 0] - cumulative[:, -1].log()
    return token, logprob.float()


def inverse_cdf(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first id [R] whose share of the last of `cumulative` [R, V] weights, in float64, exceeds `uniforms` [R] in [0, 1).

    The ends of an id's share lie within 1e-6 of those of float64 logits, and an id of weight 0 is never drawn. A uniform of 24 bits costs
    more: it draws an id with its probability give or take 2^-24, so an id below 2^-24 may be out of reach, and the distribution of V ids
    is off by up to V * 2^-25 in total variation.
    """
    total = cumulative[:, -1:].contiguous()
    token = torch.searchsorted(cumulative, uniforms[:, None].double() * total, right=True)
    # A uniform at or above the total falls past the end: the last id that adds any weight takes it.
    last = torch.searchsorted(cumulative, total)
    # Where weights are not finite no place is, and one past the end would stop a GPU for good.
    return torch.minimum(token, last).clamp_(max=cumulative.shape[1] - 1)[:, 0]
