"""Samples completions: every prompt runs once, then all completions of all prompts run in lockstep,
one token at a time. Ended completions leave the batch.

Legend: B prompts, n completions of a prompt, R = B * n, V vocabulary, D hidden width; B, n and R
shrink as completions end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.method.rollout import cut_at_stop
from opd.types import Completion, FloatArray, Prompt, Sampling
from opd_torch.batch import Batch, DecodeStep, Prefixes, lay_out_prefixes
from opd_torch.forward import (
    PromptCache,
    begin,
    concatenate_caches,
    decode,
    prefill_to_decode,
    select_rows,
)
from opd_torch.kernels.recorder import Recorder
from opd_torch.layers.attention import buffer_length
from opd_torch.model.load import Model
from opd_torch.objective import default_chunk, head_logits, operand
from opd_torch.ragged import Owner, Ragged


@dataclass(frozen=True)
class PrefilledPrompts:
    """Prompts that have run, and their cache."""

    prefixes: Prefixes
    cache: PromptCache


def read_prompts(model: Model, prompts: Sequence[Prompt]) -> PrefilledPrompts:
    """Runs all prompts in batches of at most `Device.prefill_tokens` tokens.

    `prompts` come longest first. A prompt of less than half the length of the first prompt in the
    batch starts a new batch, because attention pads to the longest.
    """
    device = model.device
    parts: list[list[Prompt]] = []
    for prompt in prompts:
        fits = parts and sum(map(len, parts[-1])) + len(prompt) <= device.prefill_tokens
        if fits and 2 * len(prompt) >= len(parts[-1][0]):
            parts[-1].append(prompt)
        else:
            parts.append([prompt])

    def laid_out(some: Sequence[Prompt]) -> Prefixes:
        return lay_out_prefixes(some, device.torch, device.prompt_multiple)

    caches = [prefill_to_decode(model, laid_out(part)) for part in parts]
    return PrefilledPrompts(laid_out(prompts), concatenate_caches(model, caches))


def sample(
    model: Model,
    prompts: Sequence[Prompt],
    uniforms: FloatArray,
    sampling: Sampling,
    prefilled: PrefilledPrompts | None = None,
) -> list[list[Completion]]:
    """Samples n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens] in
    [0, 1).

    `prefilled` are the prompts, if they have run. Raises FloatingPointError if logits are not
    finite.
    """
    # In inference mode autocast does not cache casts of weights, so every token would cast them.
    half = model.dtype == torch.bfloat16
    with torch.no_grad(), model.autocast():
        read = prefilled or read_prompts(model, prompts)
        with torch.no_grad() if half else torch.inference_mode():
            tokens, logprobs = _lockstep(model, read, uniforms, sampling)
    return cut_at_stop(tokens, logprobs, uniforms.shape[1], sampling.stop)


@dataclass
class LiveCompletions:
    """The completions in the batch, R rows, n to a prompt. Token steps change all tensors in place.

    `rows` [R] are the completions' numbers in the call, `token` [R] the tokens that run next,
    `positions` [axes, R, max_tokens] the rotary positions, `ended` [R] says which have ended, and
    `draws` [R, max_tokens] are the uniforms. `layout` is a batch of one row per completion,
    `prompts` the prompts' cache, and `cache` the completions'.
    """

    rows: Tensor
    token: Tensor
    positions: Tensor
    ended: Tensor
    draws: Tensor
    layout: Batch
    prompts: PromptCache
    cache: Sequence[Any]

    @staticmethod
    def begin(model: Model, prompts: PrefilledPrompts, uniforms: FloatArray) -> LiveCompletions:
        """All completions of the prompts, before the first token."""
        count, n, limit = uniforms.shape
        device, sources = model.device.torch, prompts.prefixes.sources
        # [axes, B, limit]; the first row is the prompt's last token.
        positions = np.stack([prompt.row_positions(limit) for prompt in sources], 1)
        last = torch.tensor([prompt.tokens[-1] for prompt in sources], device=device)
        token = last.repeat_interleave(n)
        places = torch.from_numpy(positions).to(device).repeat_interleave(n, 1)
        return LiveCompletions(
            rows=torch.arange(count * n, device=device),
            token=token,
            positions=places,
            ended=torch.zeros(count * n, dtype=torch.bool, device=device),
            draws=torch.from_numpy(uniforms.reshape(count * n, limit)).to(device),
            layout=_one_row_each(prompts.prefixes, token, places[..., 0], n),
            prompts=prompts.cache,
            cache=begin(model, prompts.cache, n),
        )

    def next_rows(self, number: Tensor) -> Batch:
        """The inputs of the token step `number` [1]."""
        positions = self.positions.index_select(2, number)[..., 0]
        return replace(self.layout, tokens=self.token, positions=positions)

    def without_ended(self, model: Model, ended: NDArray[np.bool_]) -> LiveCompletions:
        """Drops completions that have `ended` [R], if at most the share `Device.compact_below` of
        rows remains.

        All prompts must keep the same number of completions, so a prompt with fewer live ones keeps
        some that have ended. Prompts without live completions are dropped.
        """
        prefixes = self.layout.prefixes
        live = ~ended.reshape(len(prefixes.sources), -1)
        chosen = np.flatnonzero(live.any(1))
        order = np.argsort(~live[chosen], axis=1, kind="stable")
        members = order[:, : live.sum(1).max()]
        if members.size > model.device.compact_below * live.size:
            return self
        places = (chosen[:, None] * live.shape[1] + members).ravel()
        rows = torch.from_numpy(places).to(self.rows.device)
        prefixes = prefixes.select(chosen)
        prompts, cache = select_rows(model, self.prompts, self.cache, chosen, rows)
        token, positions = self.token[rows], self.positions[:, rows]
        return LiveCompletions(
            rows=self.rows[rows],
            token=token,
            positions=positions,
            ended=self.ended[rows],
            draws=self.draws[rows],
            layout=_one_row_each(prefixes, token, positions[..., 0], members.shape[1]),
            prompts=prompts,
            cache=cache,
        )


def _one_row_each(prefixes: Prefixes, tokens: Tensor, positions: Tensor, n: int) -> Batch:
    """A batch with one row for each of n completions of every prompt."""
    count, device = len(prefixes.sources), tokens.device
    return Batch(
        prefixes=prefixes,
        tokens=tokens,
        positions=positions,
        ragged=Ragged(np.ones(count * n, dtype=np.int64), device),
        prompts=Ragged(np.full(count, n), device),
        owner=Owner([n] * count, device),
    )


def _lockstep(
    model: Model, prompts: PrefilledPrompts, uniforms: FloatArray, sampling: Sampling
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Samples tokens and log-probabilities [R, steps] until every completion has ended. Entries
    after a stop token are arbitrary.

    Raises FloatingPointError if logits are not finite.
    """
    limit, device = uniforms.shape[2], model.device
    head = operand(model.head.to(model.dtype))
    banned, stop = (
        torch.tensor(ids, dtype=torch.int64, device=device.torch)
        for ids in (sampling.banned, sampling.stop)
    )
    live = LiveCompletions.begin(model, prompts, uniforms)
    tokens, logprobs = torch.zeros_like(live.draws, dtype=torch.int64), torch.zeros_like(live.draws)
    finite = torch.ones(1, dtype=torch.bool, device=device.torch)
    number = torch.zeros(1, dtype=torch.int64, device=device.torch)
    recorder = Recorder(model)

    def advance(live: LiveCompletions, step: DecodeStep) -> None:
        """Samples one token of every row. All changes are in place, so that a recorded step can be
        replayed.
        """
        hidden = decode(model, live.next_rows(number), live.prompts, live.cache, step)
        draws = live.draws.index_select(1, number)[:, 0]
        drawn, logprob = draw(hidden.to(model.dtype), head, draws, sampling.temperature, banned)
        tokens.index_put_((live.rows, number), drawn)
        logprobs.index_put_((live.rows, number), logprob)
        finite.logical_and_(logprob.isfinite().all())
        live.token.copy_(drawn)
        live.ended.logical_or_((drawn[:, None] == stop).any(1))
        number.add_(1)

    for done in range(1, limit + 1):
        rows = max(done, device.recorded_rows) if recorder.records else done
        buffer = buffer_length(rows, device.cache_tokens)
        count = buffer if recorder.records else done
        step = DecodeStep(number, count, not recorder.records, buffer)
        recorder.run((len(live.rows), count), partial(advance, live, step))
        if done % device.check_every == 0:
            *ended, all_finite = torch.cat([live.ended, finite]).tolist()
            if not all_finite:
                raise FloatingPointError
            if all(ended):
                break
            live = live.without_ended(model, np.array(ended))
    if not finite:
        raise FloatingPointError
    return tokens[:, :done].cpu().numpy(), logprobs[:, :done].cpu().numpy()


def draw(
    hidden: Tensor, head: Tensor, uniforms: Tensor, temperature: float, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """Samples one token of every row; returns tokens and log-probabilities, [R] each.

    `hidden` is [R, D], `head` [V, D], and `uniforms` [R] in [0, 1). Ids in `banned` are never
    sampled. At temperature 0 the most likely token is taken.
    """
    parts = (torch.split(x, default_chunk(len(head))) for x in (hidden, uniforms))
    pieces = [
        _draw(head_logits(h, head), u, temperature, banned) for h, u in zip(*parts, strict=True)
    ]
    tokens, logprobs = zip(*pieces, strict=True)
    return torch.cat(tokens), torch.cat(logprobs)


def _draw(
    logits: Tensor, uniforms: Tensor, temperature: float, banned: Tensor
) -> tuple[Tensor, Tensor]:
    """Samples from `logits` [R, V], as `draw` does."""
    logits = logits.index_fill_(1, banned, float("-inf"))
    logits = logits.sub_(logits.amax(1, keepdim=True)).div_(temperature or 1.0)
    # Sums in float64, because float32 sums over a vocabulary would lose rare ids.
    cumulative = logits.exp().cumsum(1, dtype=torch.float64)
    token = inverse_cdf(cumulative, uniforms) if temperature else logits.argmax(1)
    logprob = logits.gather(1, token[:, None])[:, 0] - cumulative[:, -1].log()
    return token, logprob.float()


def inverse_cdf(cumulative: Tensor, uniforms: Tensor) -> Tensor:
    """The first id [R] whose `cumulative` weight [R, V], as a share of the last one, exceeds
    `uniforms` [R] in [0, 1); all in float64.

    The bounds of an id's share are within 1e-6 of those from float64 logits, and an id of weight 0
    is never sampled. The 24 bits of a uniform matter more: probabilities are exact to 2^-24, so an
    id below 2^-24 may never be sampled, and the distribution of V ids is off by up to V * 2^-25 in
    total variation.
    """
    total = cumulative[:, -1:].contiguous()
    token = torch.searchsorted(cumulative, uniforms[:, None].double() * total, right=True)
    # Rounding can move a uniform past the end; the last id with any weight takes it.
    last = torch.searchsorted(cumulative, total)
    # With weights that are not finite an index may be past the end, and on a GPU the next gather
    # would end the process.
    return torch.minimum(token, last).clamp_(max=cumulative.shape[1] - 1)[:, 0]
