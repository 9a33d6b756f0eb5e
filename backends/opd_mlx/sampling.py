"""Rollout: every prompt once, then all completions of all prompts in lockstep, one token at a time, without those that have ended.

Legend: B prompts, n completions of a prompt, R completions that run, V vocabulary, D width.
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

from opd.method.rollout import completions
from opd.types import Completion, FloatArray, IntArray, Prompt, Sampling
from opd_mlx.batch import Batch, Prefixes, Step, lay_out_prefixes
from opd_mlx.forward import Memory, complete, look, prefill
from opd_mlx.kernels.exponentials import BLOCK, block_sums, exponential, in_blocks, total
from opd_mlx.kernels.lanes import LANES
from opd_mlx.kernels.recorder import COMPILES, Recorder
from opd_mlx.layers.attention import room
from opd_mlx.layers.layer import Own
from opd_mlx.model import Model
from opd_mlx.objective import default_chunk

PREFILL_TOKENS = 16384
"""Padded tokens of prompts that run together: what they keep is small, but what computing it holds is not."""

AHEAD = int(COMPILES)
"""Token steps that a GPU has before the host looks at what one drew, so that neither waits for the other. Completions that have ended
run that much longer."""

LEFT = 0.75
"""Share of the rows that still run at which the others are left out; it takes a copy of all keys and values."""


UNIT = 2**30
"""Parts into which the sampler divides a probability of 1: as many as leave room in 32 bits for what rounding adds."""


@dataclass(frozen=True)
class Prompted:
    """Prompts that have run: their indices in the call, and what they keep for their completions."""

    indices: list[int]
    prefixes: Prefixes
    memory: Memory


def sample(model: Model, head: mx.array, prompted: Sequence[Prompted], uniforms: FloatArray, sampling: Sampling) -> list[list[Completion]]:
    """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens]; `head` [V, D] is float32.

    Raises FloatingPointError where logits are not finite.
    """
    count, n, limit = uniforms.shape
    if not count or not n or not limit:
        return [[Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False) for _ in range(n)] for _ in range(count)]
    running = [_begin(model, one, n, limit) for one in prompted]
    mx.eval(head, model.module.parameters())
    return completions(*_lockstep(model, head, running, uniforms, sampling), n, sampling.stop)


def _lockstep(
    model: Model, head: mx.array, running: Sequence[Running], uniforms: FloatArray, sampling: Sampling
) -> tuple[IntArray, FloatArray]:
    """Tokens and log-probabilities [B * n, steps], until every completion has ended; what stands behind a stop token means nothing.

    Raises FloatingPointError where logits are not finite.
    """
    limit = uniforms.shape[2]
    draws, banned = mx.array(uniforms.reshape(-1, limit)), _banned(sampling, len(head))
    tokens, logprobs = np.zeros(draws.shape, np.int32), np.zeros(draws.shape, np.float32)
    ended, last = np.zeros(len(draws), bool), np.zeros(len(draws), np.int32)
    for share in running:
        last[share.rows] = np.array([prompt.tokens[-1] for prompt in share.prefixes.sources])[:, None]
    state: dict[str, Any] = {"number": mx.array([0]), "last": mx.array(last), "own": _own(running)}
    recorder = Recorder(state)

    def advance(own_keys: int) -> list[mx.array]:
        """One token of every row that runs and its log-probability. All that it changes, it changes in `state`."""
        number, last = state["number"], state["last"]
        step = Step(number, own_keys, exact=not recorder.records)
        hidden, rows = decode(model, running, last, step), mx.array(_rows(running))
        token, logprob = draw(hidden, head, mx.take(draws, number, axis=1)[rows, 0], sampling.temperature, banned)
        state["number"], state["last"] = number + 1, mx.put_along_axis(last, rows, token, axis=0)
        return [token, logprob]

    launched: deque[tuple[NDArray[np.intp], list[mx.array]]] = deque()
    for step in range(limit + AHEAD):
        if step < limit:
            own_keys = room(step + 1) if recorder.records else step + 1
            drawn = recorder.run((*(share.rows.shape for share in running), own_keys), partial(advance, own_keys))
            mx.async_eval(drawn, state)  # type: ignore[no-untyped-call]
            launched.append((_rows(running), drawn))
        if step < AHEAD:
            continue
        done = step - AHEAD
        rows, drawn = launched.popleft()
        tokens[rows, done], logprobs[rows, done] = map(np.array, drawn)
        if not np.isfinite(logprobs[rows, done]).all():
            raise FloatingPointError
        ended[rows] |= np.isin(tokens[rows, done], sampling.stop)
        if ended.all():
            break
        running = [share.without(ended) for share in running if not ended[share.rows].all()]
        state["own"] = _own(running)
    return tokens[:, : done + 1], logprobs[:, : done + 1]


@dataclass(frozen=True)
class Running:
    """Completions of some prompts: `rows` [B, n] are their places in the call, `positions` [axes, B, max_tokens] the rotary ones."""

    rows: NDArray[np.intp]
    positions: mx.array
    prefixes: Prefixes
    memory: Memory
    own: Sequence[Own]

    def token(self, last: mx.array, number: mx.array) -> Batch:
        """What runs next, by the step's `number` [1]: the `last` tokens, of all completions of the call."""
        at = mx.repeat(mx.take(self.positions, number, axis=2)[..., 0], self.rows.shape[1], axis=1)
        return Batch(self.prefixes, last[mx.array(self.rows.reshape(-1))], at, (*self.rows.shape, 1), None)

    def without(self, ended: NDArray[np.bool_]) -> Running:
        """The same without prompts whose completions all have `ended`, and as many a prompt as the most that any still has."""
        over = ended[self.rows]
        prompts, width = np.flatnonzero(~over.all(1)), int((~over).sum(1).max())
        if len(prompts) * width > LEFT * over.size:
            return self
        columns = np.argsort(over[prompts], axis=1, kind="stable")[:, :width]
        kept = mx.array(prompts.astype(np.int32))
        moved = [(first[kept], second[kept]) for first, second in self.memory]
        for layer in self.own:
            layer.keep(kept, mx.array(columns.astype(np.int32)))
        mx.eval(moved, [layer.arrays for layer in self.own])
        return Running(
            np.take_along_axis(self.rows[prompts], columns, axis=1),
            self.positions[:, kept],
            lay_out_prefixes([self.prefixes.sources[prompt] for prompt in prompts.tolist()], self.prefixes.shape[1]),
            moved,
            self.own,
        )


def decode(model: Model, running: Sequence[Running], last: mx.array, step: Step) -> mx.array:
    """Hidden states [R, D] of one more token of every completion, behind the `last` of each."""
    return mx.concatenate(
        LANES.each(running, lambda share: complete(model, share.token(last, step.number), share.memory, own=share.own, step=step))
    )


def run(model: Model, prompts: Sequence[Prompt]) -> list[Prompted]:
    """Runs all prompts, divided among the streams; of each stream at most PREFILL_TOKENS at a time."""
    shares = LANES.shares(prompts)
    members = [[prompts[index] for index in share] for share in shares]
    cuts = [max(1, PREFILL_TOKENS // max(map(len, share))) for share in members]
    parts: list[list[Memory]] = [[] for _ in shares]
    for number in range(max([0, *(-(-len(share) // cut) for share, cut in zip(members, cuts, strict=True))])):
        some = [share[number * cut : (number + 1) * cut] for share, cut in zip(members, cuts, strict=True)]
        look(model, [prompt for share in some for prompt in share])
        found = LANES.each(some, lambda share: prefill(model, lay_out_prefixes(share)) if share else [])
        mx.eval(found)
        for kept, memory in zip(parts, found, strict=True):
            kept += [memory] if memory else []
    return [Prompted(share, lay_out_prefixes(its), _joined(model, kept)) for share, its, kept in zip(shares, members, parts, strict=True)]


def _joined(model: Model, parts: list[Memory]) -> Memory:
    """What several calls kept, as one call would have; layer by layer, and nothing is left of the parts."""
    if len(parts) == 1:
        return parts[0]
    joined: Memory = []
    for layer in model.layers:
        joined.append(layer.join([part.pop(0) for part in parts]))
        mx.eval(joined[-1])
    return joined


def _begin(model: Model, prompted: Prompted, n: int, limit: int) -> Running:
    """All completions of prompts that have run, before their first tokens."""
    return Running(
        rows=np.array(prompted.indices)[:, None] * n + np.arange(n),
        positions=mx.array(np.stack([prompt.row_positions(limit) for prompt in prompted.prefixes.sources], axis=1)),
        prefixes=prompted.prefixes,
        memory=prompted.memory,
        own=[layer.begin(state, n) for layer, state in zip(model.layers, prompted.memory, strict=True)],
    )


def _rows(running: Sequence[Running]) -> NDArray[np.intp]:
    """The places of all that runs, in the order of a step's rows."""
    return np.concatenate([share.rows.reshape(-1) for share in running])


def _own(running: Sequence[Running]) -> list[list[mx.array]]:
    """All that layers keep of completions."""
    return [layer.arrays for share in running for layer in share.own]


def draw(hidden: mx.array, head: mx.array, uniforms: mx.array, temperature: float, banned: mx.array | None) -> tuple[mx.array, mx.array]:
    """One token of every row and its log-probability, [R] each, from `hidden` [R, D], `head` [V, D], `uniforms` [R], `banned` [V]."""
    chunk = default_chunk(len(head))
    pieces = []
    for start in range(0, len(hidden), chunk):
        logits = hidden[start : start + chunk].astype(head.dtype) @ head.T
        pieces.append(_draw(logits, uniforms[start : start + chunk], temperature, banned))
    tokens, logprobs = zip(*pieces, strict=True)
    return mx.concatenate(list(tokens)), mx.concatenate(list(logprobs))


def _draw(logits: mx.array, uniforms: mx.array, temperature: float, banned: mx.array | None) -> tuple[mx.array, mx.array]:
    """The first id whose cumulative probability exceeds the uniform; at temperature 0 the likeliest id."""
    if banned is not None:
        logits = logits + banned
    logits = logits - logits.max(-1, keepdims=True)
    if temperature not in (0, 1):
        logits = logits / temperature
    powers = exponential(logits)
    token = inverse_cdf(powers, uniforms) if temperature else mx.argmax(logits, axis=-1)
    logprob = mx.take_along_axis(logits, token[:, None], axis=-1)[:, 0] - mx.log(total(powers)[:, 0])
    return token.astype(mx.int32), logprob


def inverse_cdf(weights: mx.array, uniforms: mx.array) -> mx.array:
    """The first id [R] whose cumulative share of `weights` [R, V], in the order of the ids, exceeds `uniforms` [R] in [0, 1).

    A float32 sum over a vocabulary loses the rare ids, and a GPU has no float64. So the uniform chooses a block of ids, and what is left
    of it an id of the block, by sums of whole numbers, which are exact in any order. The ends of an id's share lie within 1e-6 of those
    that float64 gives, and an id of weight 0 is never drawn. A uniform of 24 bits costs more: it draws an id with its probability give or
    take 2^-24, so an id below 2^-24 may be out of reach, and the distribution of V ids is off by up to V * 2^-25 in total variation.
    """
    start = (uniforms * UNIT).astype(mx.int32), mx.full(uniforms.shape, UNIT, dtype=mx.int32)
    if weights.shape[-1] <= BLOCK:
        return _choose(weights, *start)[0]
    blocks = in_blocks(weights)
    block, *left = _choose(block_sums(blocks), *start)
    place, *_ = _choose(mx.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0], *left)
    return block * BLOCK + place


def _choose(weights: mx.array, target: mx.array, unit: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The first of the `weights` [R, n] whose cumulative share exceeds target / unit [R], and how far into that share this lies: again a
    target and a unit. Both are whole numbers, and the unit is at most UNIT."""
    shares = mx.round(weights * (unit.astype(mx.float32) / weights.sum(-1))[:, None]).astype(mx.int32)
    ends = mx.cumsum(shares, axis=-1)
    end = ends[:, -1]  # the unit, but for rounding
    more = mx.floor((target / unit) * (end - unit)).astype(mx.int32)
    target = mx.clip(target + more, 0, end - 1)
    chosen = mx.argmax(ends > target[:, None], axis=-1).astype(mx.int32)
    end, share = (mx.take_along_axis(x, chosen[:, None], axis=-1)[:, 0] for x in (ends, shares))
    finer = UNIT // mx.maximum(share, 1)
    return chosen, (target - (end - share)) * finer, share * finer


def _banned(sampling: Sampling, vocabulary: int) -> mx.array | None:
    """[V], -inf at banned ids."""
    if not sampling.banned:
        return None
    mask = np.zeros(vocabulary, np.float32)
    mask[list(sampling.banned)] = -np.inf
    return mx.array(mask)
