"""Rollout: every prompt once, then all completions of all prompts in lockstep, one token at a time.

Legend: B prompts, n completions of a prompt, R = B * n, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from opd.types import Completion, FloatArray, Prompt, Sampling
from opd_mlx.batch import lay_out_prefixes, row_positions
from opd_mlx.forward import decode, prefill
from opd_mlx.model import Model
from opd_mlx.objective import default_chunk


def sample(model: Model, head: mx.array, prompts: Sequence[Prompt], uniforms: FloatArray, sampling: Sampling) -> list[list[Completion]]:
    """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens]; `head` [V, D] is float32."""
    count, n, limit = uniforms.shape
    if not count or not n or not limit:
        return [[Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False) for _ in range(n)] for _ in range(count)]
    prefixes = lay_out_prefixes(prompts)
    prefix = prefill(model, prefixes)
    mx.eval(prefix)
    own = [layer.begin(state, n, limit) for layer, state in zip(model.layers, prefix, strict=True)]
    positions = np.stack([row_positions(prompt, limit) for prompt in prompts], axis=1)
    banned = _banned(sampling, len(head))
    last = np.repeat(np.array([prompt.tokens[-1] for prompt in prompts], np.int32), n)
    tokens, logprobs, ended = [], [], np.zeros(count * n, bool)
    for step in range(limit):
        at = mx.array(np.repeat(positions[:, :, step], n, axis=-1))
        hidden = decode(model, mx.array(last), at, (count, n, 1), prefix, prefixes, own, step)
        token, logprob = draw(hidden, head, mx.array(uniforms[:, :, step].reshape(-1)), sampling.temperature, banned)
        mx.eval(token, logprob, [layer.arrays for layer in own])
        last = np.array(token)
        tokens.append(last)
        logprobs.append(np.array(logprob))
        ended |= np.isin(last, sampling.stop)
        if ended.all():
            break
    return _completions(np.stack(tokens, 1), np.stack(logprobs, 1), n, sampling.stop)


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
    s = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    if not temperature:
        token = mx.argmax(logits, axis=-1, keepdims=True)
    else:
        probabilities = mx.exp(s)
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


def _completions(tokens: NDArray[np.int32], logprobs: NDArray[np.float32], n: int, stop: Sequence[int]) -> list[list[Completion]]:
    """Cuts [R, steps] arrays behind each row's first stop token."""
    stopped = np.isin(tokens, stop)
    lengths = np.where(stopped.any(1), stopped.argmax(1) + 1, tokens.shape[1])
    rows = [
        Completion(row[:length].copy(), values[:length].copy(), bool(ends[length - 1]))
        for row, values, length, ends in zip(tokens, logprobs, lengths, stopped, strict=True)
    ]
    return [rows[start : start + n] for start in range(0, len(rows), n)]
