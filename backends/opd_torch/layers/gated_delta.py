"""Layers of gated delta net (arXiv 2412.06464): a prompt's state and its last inputs are handed to each of its completions.

The same three functions as `opd_torch.layers.attention`. What a prompt leaves is `Memory`: the inputs of its last W - 1 tokens, which the
convolution still sees, and the recurrent state. Both are only read, never written, so that n completions can start from them, and all
of it is differentiable. Training, prefill and decoding run one code.

Legend: N packed rows, B rows of unequal length T, C channels of the convolution and W its width, H value heads, k and v widths of keys
and values, c rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad, softplus
from transformers.activations import ACT2FN

from opd_torch.batch import Batch, Prefixes, Step
from opd_torch.kernels.pointwise import feed_forward
from opd_torch.layers.attention import Angles
from opd_torch.ragged import Ragged

if TYPE_CHECKING:
    from opd_torch.families.family import Family

Memory: TypeAlias = tuple[Tensor, Tensor]
"""The convolution's window [B, C, W - 1] and the state [B, H, k, v], of B prompts or completions."""

CHUNK = 64
"""Rows that are solved at once."""


@dataclass
class Own:
    """What decoding keeps of a layer's completions so far."""

    memory: Memory | None = None

    def select(self, rows: Tensor) -> None:
        """Leaves only some completions."""
        if self.memory is not None:
            self.memory = self.memory[0].index_select(0, rows), self.memory[1].index_select(0, rows)


def prefix_layer(family: Family, layer: Any, hidden: Tensor, angles: Angles, prefixes: Prefixes, last: bool) -> tuple[Tensor, Memory]:
    """Prompt rows [N, D] through one layer: the rows after it, and what it leaves. After the last layer nobody reads the rows."""
    mixed, memory = _mix(layer, layer.input_layernorm(hidden), prefixes.ragged, None)
    return hidden if last else _finish(layer, hidden, mixed), memory


def completion_layer(family: Family, layer: Any, hidden: Tensor, angles: Angles, prefix: Memory, batch: Batch) -> Tensor:
    """Completion rows [N, D] through one layer, each completion from its prompt's memory."""
    window, state = (batch.owner.spread(x) for x in prefix)
    return _finish(layer, hidden, _mix(layer, layer.input_layernorm(hidden), batch.ragged, (window, state))[0])


def decode_layer(
    family: Family, layer: Any, hidden: Tensor, angles: Angles, prefix: Memory, prefixes: Prefixes, own: Own, step: Step
) -> Tensor:
    """The next row of every completion [R, D] through one layer, n to a prompt."""
    if own.memory is None:
        n = len(hidden) // len(prefix[0])
        own.memory = prefix[0].repeat_interleave(n, 0), prefix[1].repeat_interleave(n, 0)
    rows = Ragged(np.ones(len(hidden), dtype=np.int64), hidden.device)
    mixed, memory = _mix(layer, layer.input_layernorm(hidden), rows, own.memory)
    # In place: a recorded step finds its memory where it stood.
    for old, new in zip(own.memory, memory, strict=True):
        old.copy_(new)
    return _finish(layer, hidden, mixed)


def _finish(layer: Any, hidden: Tensor, mixed: Tensor) -> Tensor:
    hidden = hidden + layer.linear_attn.out_proj(mixed)
    return hidden + feed_forward(layer.mlp, layer.post_attention_layernorm(hidden))


def _mix(layer: Any, normed: Tensor, ragged: Ragged, memory: Memory | None) -> tuple[Tensor, Memory]:
    """What the layer finds for normalised rows [N, D], before its output projection [N, H * v], and the memory after each row's end."""
    net = layer.linear_attn
    inputs = ragged.pad(net.in_proj_qkv(normed)).transpose(1, 2)
    if memory is None:
        memory = (
            inputs.new_zeros(*inputs.shape[:2], net.conv_kernel_size - 1),
            inputs.new_zeros(len(inputs), net.num_v_heads, net.head_k_dim, net.head_v_dim, dtype=_wide(inputs)),
        )
    seen = torch.cat([memory[0].to(inputs.dtype), inputs], -1)
    # Where a row ends, the window behind it is the last W - 1 of what it has seen.
    if ragged.even:
        window = seen[..., ragged.longest :]
    else:
        ends = ragged.counts[:, None] + torch.arange(net.conv_kernel_size - 1, device=seen.device)
        window = seen.gather(2, ends[:, None].expand(-1, seen.shape[1], -1))
    kernel = net.conv1d.weight.to(seen.dtype)
    channels = ACT2FN[net.activation](conv1d(seen, kernel, groups=len(kernel))).transpose(1, 2)
    query, key, value = channels.split([net.key_dim, net.key_dim, net.value_dim], -1)
    # As transformers rounds it; padding neither decays the state nor writes to it.
    decay = -net.A_log.float().exp() * softplus(net.in_proj_a(normed).float() + net.dt_bias)
    rate = net.in_proj_b(normed).sigmoid()
    decay, rate = (ragged.fill(x, 0.0) for x in (decay, rate))
    heads = (query.unflatten(-1, (-1, net.head_k_dim)), key.unflatten(-1, (-1, net.head_k_dim)), value.unflatten(-1, (-1, net.head_v_dim)))
    with torch.autocast(seen.device.type, enabled=False):
        found, state = gated_delta_rule(*heads, decay, rate, memory[1])
    found = ragged.unpad(found.to(normed.dtype if normed.dtype == torch.float64 else inputs.dtype))
    gate = net.in_proj_z(normed).unflatten(-1, (-1, net.head_v_dim))
    return net.norm(found, gate).flatten(1), (window, state)


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, state: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Outputs [B, T, H, v] and last state [B, H, k, v] of S_t = exp(decay_t) S_(t-1) + k_t rate_t (v_t - k_t' exp(decay_t) S_(t-1))'.

    `query`, `key` [B, T, G, k] are normalised here, and each serves H / G value heads; output t is S_t' q_t / sqrt(k).
    `value` [B, T, H, v]; `decay` <= 0 and `rate` [B, T, H]; `state` [B, H, k, v].
    Chunks of rows are solved at once (arXiv 2406.06484), in float32 or float64.
    """
    wide, length = _wide(value), value.shape[1]
    repeats = value.shape[2] // key.shape[2]
    query, key = (x.to(wide) * torch.rsqrt(x.to(wide).square().sum(-1, keepdim=True) + 1e-6) for x in (query, key))
    query = query * query.shape[-1] ** -0.5
    query, key = (x.repeat_interleave(repeats, 2) for x in (query, key))
    chunk = min(chunk, length)
    rest = -length % chunk
    # [B, H, chunks, c, ...]; rows of zeros change nothing.
    q, k, v = (pad(x.to(wide), (0, 0, 0, 0, 0, rest)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4) for x in (query, key, value))
    g, beta = (pad(x.to(wide), (0, 0, 0, rest)).unflatten(1, (-1, chunk)).permute(0, 3, 1, 2) for x in (decay, rate))
    fallen = g.cumsum(-1)
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    between = (fallen[..., :, None] - fallen[..., None, :]).masked_fill(later, float("-inf")).exp()
    written = k * beta[..., None]
    # Unit lower triangular; its diagonal is not read.
    system = (written @ k.transpose(-1, -2)) * between
    right = torch.cat([v * beta[..., None], written * fallen.exp()[..., None]], -1)
    values, reads = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split([v.shape[-1], k.shape[-1]], -1)
    inner = (q @ k.transpose(-1, -2)) * between
    q = q * fallen.exp()[..., None]
    k = k * (fallen[..., -1:] - fallen).exp()[..., None]
    state = state.to(wide)
    out = []
    for number in range(q.shape[2]):
        new = values[:, :, number] - reads[:, :, number] @ state
        out.append(q[:, :, number] @ state + inner[:, :, number] @ new)
        state = state * fallen[:, :, number, -1].exp()[..., None, None] + k[:, :, number].transpose(-1, -2) @ new
    return torch.cat(out, 2)[:, :, :length].transpose(1, 2), state


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
