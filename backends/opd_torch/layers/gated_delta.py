"""Gated delta nets (arXiv 2412.06464), which keep a state instead of keys and values.

A prompt leaves a recurrent state, and the inputs of the prompt's last W - 1 tokens, which the
convolution still reads. Nothing overwrites the two, so n completions can start from them, and all
of it is differentiable. Training, prefill and decoding run the same code.

Legend: N packed rows, B rows of unequal length T, C channels of the convolution, W width of its
kernel, H value heads, k and v widths of keys and values, c rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, softplus
from transformers.activations import ACT2FN

from opd_torch.batch import Batch, DecodeStep, Prefixes, Visibility
from opd_torch.kernels.pointwise import feed_forward
from opd_torch.layers.layer import Angles, stack_prompts
from opd_torch.layers.modules import DecoderLayer, DeltaNet
from opd_torch.ragged import Ragged

_State: TypeAlias = tuple[Tensor, Tensor]
"""The convolution's last inputs [B, C, W - 1] and the recurrent state [B, H, k, v], of B prompts or
completions.
"""

CHUNK = 64
"""The rows that the delta rule solves together."""


class _StateCache:
    """The state of a layer's completions, which every token step overwrites."""

    def __init__(self, state: _State) -> None:
        self.state = state

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the completions `rows`, indices into R."""
        window, state = self.state
        self.state = window.index_select(0, rows), state.index_select(0, rows)


class GatedDelta:
    """A layer of gated delta net and feed-forward; `layers.layer.Layer` describes the public
    methods.
    """

    rotary = 0
    visibility = Visibility()

    def __init__(self, module: DecoderLayer) -> None:
        self.module = module

    def prefix(
        self, hidden: Tensor, angles: Angles, prefixes: Prefixes, last: bool
    ) -> tuple[Tensor, _State]:
        """Runs prompt rows [N, D]."""
        normed = self.module.input_layernorm(hidden)
        mixed, state = _mix(self.module.linear_attn, normed, prefixes.ragged, None)
        return hidden if last else self._finish(hidden, mixed), state

    def completion(
        self,
        hidden: Tensor,
        angles: Angles,
        prefix: _State,
        batch: Batch,
        cache: _StateCache | None = None,
        step: DecodeStep | None = None,
    ) -> Tensor:
        """Runs completion rows [M, D], or in a `step` the next row of every completion."""
        normed = self.module.input_layernorm(hidden)
        if cache is None:
            window, state = (batch.owner.spread(x) for x in prefix)
        else:
            window, state = cache.state
        mixed, after = _mix(self.module.linear_attn, normed, batch.ragged, (window, state))
        if cache is not None:
            # In place, because a recorded step always reads the same tensors.
            for old, new in zip(cache.state, after, strict=True):
                old.copy_(new)
        return self._finish(hidden, mixed)

    def visual_weights(self, hidden: Tensor, angles: Angles, prefix: _State, batch: Batch) -> None:
        """None: a delta net has no keys."""

    def begin(self, prefix: _State, n: int) -> _StateCache:
        """Copies each prompt's state for each of n completions."""
        window, state = prefix
        return _StateCache((window.repeat_interleave(n, 0), state.repeat_interleave(n, 0)))

    def join(self, prefixes: Sequence[_State]) -> _State:
        """The states of all prompts."""
        window, state = map(stack_prompts, zip(*prefixes, strict=True))
        return window, state

    def _finish(self, hidden: Tensor, mixed: Tensor) -> Tensor:
        hidden = hidden + self.module.linear_attn.out_proj(mixed)
        normed = self.module.post_attention_layernorm(hidden)
        return hidden + feed_forward(self.module.mlp, normed)


def _mix(
    net: DeltaNet, normed: Tensor, ragged: Ragged, before: _State | None
) -> tuple[Tensor, _State]:
    """Runs the net over normalised rows [N, D], from the state `before` or from zeros.

    Returns outputs [N, H * v] before the output projection, and the state at the end of each row.
    """
    inputs = ragged.pad(net.in_proj_qkv(normed)).transpose(1, 2)
    if before is None:
        states = len(inputs), net.num_v_heads, net.head_k_dim, net.head_v_dim
        before = (
            inputs.new_zeros(*inputs.shape[:2], net.conv_kernel_size - 1),
            inputs.new_zeros(*states, dtype=_wide(inputs)),
        )
    seen = torch.cat([before[0].to(inputs.dtype), inputs], -1)
    # The window after a row is the last W - 1 inputs that the row has seen.
    if ragged.even:
        window = seen[..., ragged.longest :]
    else:
        ends = torch.arange(net.conv_kernel_size - 1, device=seen.device) + ragged.counts[:, None]
        window = seen.gather(2, ends[:, None].expand(-1, seen.shape[1], -1))
    kernel = net.conv1d.weight.to(seen.dtype)
    channels: Tensor = ACT2FN[net.activation](conv1d(seen, kernel, groups=len(kernel)))
    channels = channels.transpose(1, 2)
    query, key, value = torch.split(channels, [net.key_dim, net.key_dim, net.value_dim], -1)
    # Rounded as in transformers. At padding both are 0, so padding leaves the state as it is.
    decay = -net.A_log.float().exp() * softplus(net.in_proj_a(normed).float() + net.dt_bias)
    rate = net.in_proj_b(normed).sigmoid()
    decay, rate = (ragged.fill(x, 0.0) for x in (decay, rate))
    query, key = (torch.unflatten(x, -1, (-1, net.head_k_dim)) for x in (query, key))
    value = torch.unflatten(value, -1, (-1, net.head_v_dim))
    with torch.autocast(seen.device.type, enabled=False):
        mixed, state = gated_delta_rule(query, key, value, decay, rate, before[1])
    mixed = ragged.unpad(mixed.to(normed.dtype if normed.dtype == torch.float64 else inputs.dtype))
    gate = torch.unflatten(net.in_proj_z(normed), -1, (-1, net.head_v_dim))
    return net.norm(mixed, gate).flatten(1), (window, state)


def gated_delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    rate: Tensor,
    state: Tensor,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Computes outputs [B, T, H, v] and the last state [B, H, k, v] by the gated delta rule.

    S_t = exp(decay_t) S_(t-1) + k_t rate_t (v_t - k_t' exp(decay_t) S_(t-1))', and output t is
    S_t' q_t / sqrt(k). `query` and `key` [B, T, G, k] are normalised here, and each head serves
    H / G value heads. `value` is [B, T, H, v], `decay` <= 0 and `rate` are [B, T, H], `state` is
    [B, H, k, v]. The rows of a chunk are solved together (arXiv 2406.06484), in float32 or float64.
    """
    wide, length = _wide(value), value.shape[1]
    repeats = value.shape[2] // key.shape[2]
    query, key = (
        x.to(wide) * torch.rsqrt(x.to(wide).square().sum(-1, keepdim=True) + 1e-6)
        for x in (query, key)
    )
    query = query * query.shape[-1] ** -0.5
    query, key = (x.repeat_interleave(repeats, 2) for x in (query, key))
    chunk = min(chunk, length)
    rest = -length % chunk

    def chunked(x: Tensor) -> Tensor:
        """[B, T, heads, ...] as [B, heads, chunks, c, ...]; rows of zeros at the end have no effect
        on the state.
        """
        padded = pad(x.to(wide), (*(0, 0) * (x.ndim - 2), 0, rest))
        return torch.unflatten(padded, 1, (-1, chunk)).movedim(3, 1)

    q, k, v, g, beta = (chunked(x) for x in (query, key, value, decay, rate))
    # The logarithm of the decay since the start of the chunk, and the decay between any two rows.
    decayed = g.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = decayed[..., :, None] - decayed[..., None, :]
    between = between.masked_fill(later, float("-inf")).exp()
    written = k * beta[..., None]
    # Unit lower triangular; the solver does not read the diagonal.
    system = (written @ k.transpose(-1, -2)) * between
    right = torch.cat([v * beta[..., None], written * decayed.exp()[..., None]], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, reads = torch.split(solved, [v.shape[-1], k.shape[-1]], -1)
    inner = (q @ k.transpose(-1, -2)) * between
    q = q * decayed.exp()[..., None]
    k = k * (decayed[..., -1:] - decayed).exp()[..., None]
    state = state.to(wide)
    out = []
    for number in range(q.shape[2]):
        new = values[:, :, number] - reads[:, :, number] @ state
        out.append(q[:, :, number] @ state + inner[:, :, number] @ new)
        state = (
            state * decayed[:, :, number, -1].exp()[..., None, None]
            + k[:, :, number].transpose(-1, -2) @ new
        )
    return torch.cat(out, 2)[:, :, :length].transpose(1, 2), state


def _wide(x: Tensor) -> torch.dtype:
    """Float32, or float64 for `x` in float64."""
    return torch.promote_types(x.dtype, torch.float32)
