"""Rollout: every prompt once, then all completions of all prompts in lockstep, one token at a time, without those that have ended.

Legend: B prompts, n completions of a prompt, R completions that run, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Completion, FloatArray, IntArray, Prompt, Sampling
from opd_mlx.attention import Own
from opd_mlx.batch import Batch, Prefixes, lay_out_prefixes
from opd_mlx.forward import Memory, complete, look, prefill
from opd_mlx.kernels.exponentials import log_softmax
from opd_mlx.kernels.lanes import LANES
from opd_mlx.model import Model
from opd_mlx.objective import default_chunk

PREFILL_TOKENS = 16384
"""Padded tokens of prompts that run together: what they keep is small, but what computing it holds is not."""

LEFT = 0.75
"""Share of the rows that still run at which the others are left out; it takes a copy of all keys and values."""


@dataclass(frozen=True)
class Prompted:
    """Prompts that have run: their indices in the call, and what they keep for their completions."""

    indices: list[int]
    prefixes: Prefixes
    memory: Memory


def sample(model: Model, head: mx.array, prompted: Sequence[Prompted], uniforms: FloatArray, sampling: Sampling) -> list[list[Completion]]:
    """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens]; `head` [V, D] is float32."""
    count, n, limit = uniforms.shape
    if not count or not n or not limit:
        return [[Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False) for _ in range(n)] for _ in range(count)]
    running = [_begin(model, one, n, limit) for one in prompted]
    banned = _banned(sampling, len(head))
    uniforms = uniforms.reshape(count * n, limit)
    tokens, logprobs = np.zeros(uniforms.shape, np.int32), np.zeros(uniforms.shape, np.float32)
    lengths, alive = np.full(count * n, limit), np.ones(count * n, bool)
    last = np.zeros(count * n, np.int32)
    for share in running:
        last[share.rows] = np.array([prompt.tokens[-1] for prompt in share.prefixes.sources])[:, None]
    for step in range(limit):
        rows = np.concatenate([share.rows.reshape(-1) for share in running])
        hidden = decode(model, running, last, step)
        token, logprob = draw(hidden, head, mx.array(uniforms[rows, step]), sampling.temperature, banned)
        mx.eval(token, logprob, [layer.arrays for share in running for layer in share.own])
        tokens[rows, step], logprobs[rows, step] = np.array(token), np.array(logprob)
        last = tokens[:, step]
        ended = rows[alive[rows] & np.isin(last[rows], sampling.stop)]
        alive[ended], lengths[ended] = False, step + 1
        running = [share.without(~alive) for share in running if alive[share.rows].any()]
        if not running:
            break
    found = [
        Completion(row[:length].copy(), values[:length].copy(), bool(finished))
        for row, values, length, finished in zip(tokens, logprobs, lengths, ~alive, strict=True)
    ]
    return [found[start : start + n] for start in range(0, len(found), n)]


@dataclass(frozen=True)
class Running:
    """Completions of some prompts: `rows` [B, n] are their places in the call, `positions` [axes, B, max_tokens] the rotary ones."""

    rows: NDArray[np.intp]
    positions: IntArray
    prefixes: Prefixes
    memory: Memory
    own: Sequence[Own]

    def token(self, step: int, last: IntArray) -> Batch:
        """What runs next: the `last` tokens, of all completions of the call."""
        at = np.repeat(self.positions[:, :, step], self.rows.shape[1], axis=-1)
        return Batch(self.prefixes, mx.array(last[self.rows.reshape(-1)]), mx.array(at), (*self.rows.shape, 1), None)

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
            self.positions[:, prompts],
            lay_out_prefixes([self.prefixes.sources[prompt] for prompt in prompts.tolist()], self.prefixes.shape[1]),
            moved,
            self.own,
        )


def decode(model: Model, running: Sequence[Running], last: IntArray, step: int) -> mx.array:
    """Hidden states [R, D] of one more token of every completion, behind the `last` of each."""
    return mx.concatenate(
        LANES.each(running, lambda share: complete(model, share.token(step, last), share.memory, own=share.own, first=step))
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
        positions=np.stack([prompt.row_positions(limit) for prompt in prompted.prefixes.sources], axis=1),
        prefixes=prompted.prefixes,
        memory=prompted.memory,
        own=[layer.begin(state, n, limit) for layer, state in zip(model.layers, prompted.memory, strict=True)],
    )


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
    if temperature:
        logits = logits / temperature
    s, probabilities = log_softmax(logits)
    if not temperature:
        token = mx.argmax(logits, axis=-1, keepdims=True)
    else:
        cumulative = mx.cumsum(probabilities, axis=-1)
        # A uniform at or above the rounded total goes to the last id that adds any probability; and an id of probability 0 is never
        # taken, wherever a parallel sum rounds.
        possible = probabilities > 0
        total = mx.where(possible, cumulative, 0.0).max(-1, keepdims=True)
        token = mx.argmax(possible & ((cumulative > uniforms[:, None]) | (cumulative >= total)), axis=-1, keepdims=True)
    return token[:, 0].astype(mx.int32), mx.take_along_axis(s, token, axis=-1)[:, 0]


def _banned(sampling: Sampling, vocabulary: int) -> mx.array | None:
    """[V], -inf at banned ids."""
    if not sampling.banned:
        return None
    mask = np.zeros(vocabulary, np.float32)
    mask[list(sampling.banned)] = -np.inf
    return mx.array(mask)
