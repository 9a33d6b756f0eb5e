"""Samples completions: every prompt runs once, then all completions of all prompts run in lockstep,
one token at a time. Ended completions leave the batch.

Legend: B prompts, n completions of a prompt, R live completions, V vocabulary, D hidden width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.method.rollout import cut_at_stop
from opd.types import Completion, FloatArray, IntArray, Prompt, Sampling
from opd_mlx.batch import Batch, DecodeStep, Prefixes, lay_out_prefixes
from opd_mlx.forward import PromptCache, concatenate_caches, decode, prefill, select_rows, warm
from opd_mlx.kernels.recorder import Recorder
from opd_mlx.kernels.sums import BLOCK, block_sums, in_blocks, total
from opd_mlx.layers.attention import buffer_length
from opd_mlx.layers.layer import CompletionCache
from opd_mlx.model import Model
from opd_mlx.objective import default_chunk

UNIT = 2**30
"""The whole number that stands for a probability of 1; int32 leaves room for rounding above it."""


@dataclass(frozen=True)
class PrefilledPrompts:
    """Prompts that have run, and their cache."""

    prefixes: Prefixes
    cache: PromptCache


def sample(
    model: Model,
    head: mx.array,
    prompts: PrefilledPrompts,
    uniforms: FloatArray,
    sampling: Sampling,
) -> list[list[Completion]]:
    """Samples n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens] in
    [0, 1).

    `head` [V, D] is float32. Raises FloatingPointError if logits are not finite.
    """
    _, n, limit = uniforms.shape
    live = _begin(model, prompts, n, limit)
    mx.eval(head, model.module.parameters())
    return cut_at_stop(*_lockstep(model, head, live, uniforms, sampling), n, sampling.stop)


def read_prompts(model: Model, prompts: Sequence[Prompt]) -> PrefilledPrompts:
    """Runs all prompts, at most `device.prefill_tokens` at a time."""
    together = max(1, model.device.prefill_tokens // max(map(len, prompts)))
    parts: list[PromptCache] = []
    for start in range(0, len(prompts), together):
        some = prompts[start : start + together]
        warm(model, some)
        parts.append(prefill(model, lay_out_prefixes(some)))
        mx.eval(parts[-1])
    return PrefilledPrompts(lay_out_prefixes(prompts), concatenate_caches(model, parts))


def _lockstep(
    model: Model, head: mx.array, live: LiveCompletions, uniforms: FloatArray, sampling: Sampling
) -> tuple[IntArray, FloatArray]:
    """Samples tokens and log-probabilities [B * n, steps] until every completion has ended. Entries
    after a stop token are arbitrary.

    Raises FloatingPointError if logits are not finite.
    """
    limit, device = uniforms.shape[2], model.device
    draws, banned = mx.array(uniforms.reshape(-1, limit)), _banned(sampling, len(head))
    tokens, logprobs = np.zeros(draws.shape, np.int32), np.zeros(draws.shape, np.float32)
    ended, last = np.zeros(len(draws), bool), np.zeros(len(draws), np.int32)
    last[live.rows] = np.array([prompt.tokens[-1] for prompt in live.prefixes.sources])[:, None]
    state: dict[str, Any] = {"number": mx.array([0]), "last": mx.array(last), "caches": live.arrays}
    recorder = Recorder(state, device.compiles)

    def advance(count: int) -> list[mx.array]:
        """Samples one token of every live row; returns tokens and log-probabilities. All changes
        are in `state`."""
        number, last = state["number"], state["last"]
        step = DecodeStep(number, count, exact=not recorder.compiles)
        batch, rows = live.token(last, number), mx.array(live.rows.reshape(-1))
        hidden = decode(model, batch, live.cache, live.caches, step)
        uniform = mx.take(draws, number, axis=1)[rows, 0]
        token, logprob = draw(hidden, head, uniform, sampling.temperature, banned)
        state["number"], state["last"] = number + 1, mx.put_along_axis(last, rows, token, axis=0)
        return [token, logprob]

    launched: deque[tuple[NDArray[np.intp], list[mx.array]]] = deque()
    for number in range(limit + device.steps_ahead):
        if number < limit:
            count = number + 1
            if recorder.compiles:
                count = buffer_length(count, device.cache_tokens)
            drawn = recorder.run((live.rows.shape, count), partial(advance, count))
            mx.async_eval(drawn, state)
            launched.append((live.rows.reshape(-1), drawn))
        if number < device.steps_ahead:
            continue
        done = number - device.steps_ahead
        rows, drawn = launched.popleft()
        tokens[rows, done], logprobs[rows, done] = map(np.array, drawn)
        if not np.isfinite(logprobs[rows, done]).all():
            raise FloatingPointError
        ended[rows] |= np.isin(tokens[rows, done], sampling.stop)
        if ended.all():
            break
        live = live.without(ended, device.compact_below)
        state["caches"] = live.arrays
    return tokens[:, : done + 1], logprobs[:, : done + 1]


@dataclass(frozen=True)
class LiveCompletions:
    """The completions in the batch, n to a prompt.

    `rows` [B, n] are the completions' numbers in the call, `positions` [axes, B, max_tokens] the
    rotary positions, `cache` is that of the prompts, and `caches` hold the completions' tokens,
    layer by layer.
    """

    rows: NDArray[np.intp]
    positions: mx.array
    prefixes: Prefixes
    cache: PromptCache
    caches: Sequence[CompletionCache]

    @property
    def arrays(self) -> list[list[mx.array]]:
        """The arrays of all caches."""
        return [cache.arrays for cache in self.caches]

    def token(self, last: mx.array, number: mx.array) -> Batch:
        """The inputs of the token step `number` [1]; `last` are the last tokens of all completions
        of the call.
        """
        at = mx.take(self.positions, number, axis=2)[..., 0]
        at = mx.repeat(at, self.rows.shape[1], axis=1)
        tokens = last[mx.array(self.rows.reshape(-1))]
        return Batch(self.prefixes, tokens, at, (*self.rows.shape, 1), None)

    def without(self, ended: NDArray[np.bool_], compact_below: float) -> LiveCompletions:
        """Drops completions that have `ended`, if at most the share `compact_below` of rows
        remains.

        All prompts must keep the same number of completions, so a prompt with fewer live ones keeps
        some that have ended. Prompts without live completions are dropped.
        """
        live = ~ended[self.rows]
        prompts, width = np.flatnonzero(live.any(1)), int(live.sum(1).max())
        if len(prompts) * width > compact_below * live.size:
            return self
        columns = np.argsort(~live[prompts], axis=1, kind="stable")[:, :width]
        chosen = mx.array(prompts.astype(np.int32))
        cache = select_rows(self.cache, chosen)
        for layer_cache in self.caches:
            layer_cache.select_rows(chosen, mx.array(columns.astype(np.int32)))
        mx.eval(cache, self.arrays)
        sources = [self.prefixes.sources[prompt] for prompt in prompts.tolist()]
        return LiveCompletions(
            np.take_along_axis(self.rows[prompts], columns, axis=1),
            self.positions[:, chosen],
            lay_out_prefixes(sources, self.prefixes.shape[1]),
            cache,
            self.caches,
        )


def _begin(model: Model, prompts: PrefilledPrompts, n: int, limit: int) -> LiveCompletions:
    """All completions of the prompts, before the first token."""
    sources = prompts.prefixes.sources
    positions = np.stack([prompt.row_positions(limit) for prompt in sources], axis=1)
    layers = zip(model.layers, prompts.cache, strict=True)
    return LiveCompletions(
        rows=np.arange(len(sources) * n).reshape(-1, n),
        positions=mx.array(positions),
        prefixes=prompts.prefixes,
        cache=prompts.cache,
        caches=[layer.begin(prefix, n) for layer, prefix in layers],
    )


def draw(
    hidden: mx.array,
    head: mx.array,
    uniforms: mx.array,
    temperature: float,
    banned: mx.array | None,
) -> tuple[mx.array, mx.array]:
    """Samples one token of every row; returns tokens and log-probabilities, [R] each.

    `hidden` is [R, D], `head` [V, D], `uniforms` [R] in [0, 1), and `banned` [V] is -inf at banned
    ids. At temperature 0 the most likely token is taken.
    """
    chunk = default_chunk(len(head))
    pieces = []
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = hidden[rows].astype(head.dtype) @ head.T
        pieces.append(_draw(logits, uniforms[rows], temperature, banned))
    tokens, logprobs = zip(*pieces, strict=True)
    return mx.concatenate(list(tokens)), mx.concatenate(list(logprobs))


def _draw(
    logits: mx.array, uniforms: mx.array, temperature: float, banned: mx.array | None
) -> tuple[mx.array, mx.array]:
    """Samples from `logits` [R, V], as `draw` does."""
    if banned is not None:
        logits = logits + banned
    logits = logits - logits.max(-1, keepdims=True)
    if temperature not in (0, 1):
        logits = logits / temperature
    powers = mx.exp(logits)
    token = inverse_cdf(powers, uniforms) if temperature else mx.argmax(logits, axis=-1)
    chosen = mx.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
    return token.astype(mx.int32), chosen - mx.log(total(powers)[:, 0])


def inverse_cdf(weights: mx.array, uniforms: mx.array) -> mx.array:
    """The first id [R] whose cumulative share of `weights` [R, V] exceeds `uniforms` [R] in [0, 1).

    A float32 sum over a vocabulary would lose rare ids, and a GPU has no float64. So the uniform
    first chooses a block of ids, and the rest of the uniform an id within the block, both by sums
    of whole numbers, which are exact in any order. The bounds of an id's share are within 1e-6 of
    those in float64, and an id of weight 0 is never sampled. The 24 bits of a uniform matter more:
    probabilities are exact to 2^-24, so an id below 2^-24 may never be sampled, and the
    distribution of V ids is off by up to V * 2^-25 in total variation.
    """
    start = (uniforms * UNIT).astype(mx.int32), mx.full(uniforms.shape, UNIT, dtype=mx.int32)
    if weights.shape[-1] <= BLOCK:
        return _choose(weights, *start)[0]
    blocks = in_blocks(weights)
    block, *left = _choose(block_sums(blocks), *start)
    within = mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    place, *_ = _choose(within, *left)
    return block * BLOCK + place


def _choose(
    weights: mx.array, target: mx.array, unit: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """The first of the `weights` [R, n] whose cumulative share exceeds target / unit [R].

    Also returns how far into that share the quotient lies, as a new target and unit. Both are whole
    numbers, and a unit is at most UNIT.
    """
    factor = (unit.astype(mx.float32) / weights.sum(-1))[:, None]
    shares = mx.round(weights * factor).astype(mx.int32)
    ends = mx.cumsum(shares, axis=-1)
    end = ends[:, -1]  # the unit, but for rounding
    more = mx.floor((target / unit) * (end - unit)).astype(mx.int32)
    target = mx.clip(target + more, 0, end - 1)
    chosen = mx.argmax(ends > target[:, None], axis=-1).astype(mx.int32)
    end, share = (mx.take_along_axis(x, chosen[:, None], axis=-1)[:, 0] for x in (ends, shares))
    finer = UNIT // mx.maximum(share, 1)
    return chosen, (target - (end - share)) * finer, share * finer


def _banned(sampling: Sampling, vocabulary: int) -> mx.array | None:
    """An array [V] that is -inf at banned ids and 0 elsewhere; None without banned ids."""
    if not sampling.banned:
        return None
    mask = np.zeros(vocabulary, np.float32)
    mask[list(sampling.banned)] = -np.inf
    return mx.array(mask)
