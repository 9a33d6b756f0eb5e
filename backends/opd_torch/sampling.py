"""Rollout: every prompt once, then all completions of all prompts in lockstep, one token at a time.

Legend: B prompts, n completions of a prompt, R = B * n, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opd.types import Completion, FloatArray, Prompt, Sampling
from opd_torch.batch import lay_out_prefixes, row_positions
from opd_torch.forward import decode, prefill
from opd_torch.objective import default_chunk, head_logits, operand


def sample(model: Any, prompts: Sequence[Prompt], uniforms: FloatArray, sampling: Sampling, dtype: torch.dtype) -> list[list[Completion]]:
    """Draws n completions of each prompt by inverse CDF from `uniforms` [B, n, max_tokens]; the head computes in `dtype`."""
    count, n, limit = uniforms.shape
    if not count or not n or not limit:
        return [[Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False) for _ in range(n)] for _ in range(count)]
    with torch.no_grad():
        tokens, logprobs = _lockstep(model, prompts, uniforms.reshape(count * n, limit), sampling, dtype)
    return _completions(tokens, logprobs, n, sampling.stop)


def _lockstep(
    model: Any, prompts: Sequence[Prompt], uniforms: FloatArray, sampling: Sampling, dtype: torch.dtype
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Tokens and log-probabilities [R, steps], until every completion has ended; what stands behind a stop token means nothing."""
    n, limit = len(uniforms) // len(prompts), uniforms.shape[1]
    head = model.lm_head.weight
    device = head.device
    head = operand(head.to(dtype))
    draws = torch.from_numpy(uniforms).to(device)
    banned, stop = (torch.tensor(ids, dtype=torch.int64, device=device) for ids in (sampling.banned, sampling.stop))
    prefixes = lay_out_prefixes(prompts, device)
    memory, own = prefill(model, prefixes), list[Any]()
    # [axes, R, limit]; the first row is the prompt's last token.
    positions = torch.from_numpy(np.stack([row_positions(prompt, limit) for prompt in prompts], 1)).to(device).repeat_interleave(n, 1)
    token = torch.tensor([prompt.tokens[-1] for prompt in prompts], device=device).repeat_interleave(n)
    tokens, logprobs, ended = [], [], torch.zeros(len(uniforms), dtype=torch.bool, device=device)
    for step in range(limit):
        hidden = decode(model, token, positions[:, :, step], memory, prefixes, own)
        token, logprob = draw(hidden.to(dtype), head, draws[:, step], sampling.temperature, banned)
        tokens.append(token)
        logprobs.append(logprob)
        ended |= torch.isin(token, stop)
        if ended.all():
            break
    return torch.stack(tokens, 1).cpu().numpy(), torch.stack(logprobs, 1).cpu().numpy()


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
    s = (logits.div_(temperature) if temperature else logits).log_softmax(1)
    if not temperature:
        token = s.argmax(1, keepdim=True)
    else:
        # Sums in float64: over a large vocabulary float32 loses the rare tokens.
        cumulative = s.exp().cumsum(1, dtype=torch.float64)
        token = torch.searchsorted(cumulative, uniforms[:, None].double(), right=True)
        # A uniform at or above the rounded total falls past the end: the last id that adds any probability takes it.
        last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
        token = torch.minimum(token, last)
    return token[:, 0], s.gather(1, token)[:, 0].float()


def _completions(tokens: NDArray[np.int64], logprobs: NDArray[np.float32], n: int, stop: Sequence[int]) -> list[list[Completion]]:
    """Cuts [R, steps] arrays behind each row's first stop token."""
    stopped = np.isin(tokens, stop)
    finished = np.atleast_1d(stopped.any(1))
    lengths = np.where(finished, stopped.argmax(1) + 1, tokens.shape[1])
    rows = [
        Completion(row[:length].astype(np.int32), values[:length].copy(), bool(found))
        for row, values, length, found in zip(tokens, logprobs, lengths, finished, strict=True)
    ]
    return [rows[start : start + n] for start in range(0, len(rows), n)]
