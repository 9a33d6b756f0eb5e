"""Gated delta nets, which keep a state instead of keys.

The state after a prompt, and the last inputs of the short convolution, are what n completions start from. The delta rule in chunks
is mlx-vlm's.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens, K kernel of the convolution, C its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn

from opd_mlx.batch import Masks, Prefixes, Rule, Step
from opd_mlx.layers.attention import feed_forward
from opd_mlx.layers.layer import KeysValues

CHUNK = 64
"""Tokens of which the delta rule is one solve."""

SEGMENT = 4 * CHUNK
"""Tokens for which a backward holds what convolution and rule compute, 1 MB a token in a layer of the 4B model; it computes it again."""


@dataclass
class State:
    """In decoding: the state [B * n, heads, value width, key width] in float32, and the convolution's last inputs [B * n, K - 1, C]."""

    arrays: list[mx.array]
    prompts: int

    def keep(self, prompts: mx.array, columns: mx.array) -> None:
        """See `Own`."""
        rows = (prompts[:, None] * (len(self.arrays[0]) // self.prompts) + columns).reshape(-1)
        self.arrays[:], self.prompts = [part[rows] for part in self.arrays], len(prompts)


class GatedDelta:
    """See `Layer`. Its "keys and values" are the state and the convolution's window after each prompt, [B, ...]."""

    rotary = 0
    rule = Rule()

    def __init__(self, module: Any) -> None:
        self.module = module

    def prefix(
        self, hidden: mx.array, angles: KeysValues, prefixes: Prefixes, mask: mx.array | None, last: bool
    ) -> tuple[mx.array, KeysValues]:
        """See `Layer`. Padding changes no state: it neither decays nor writes, and the window ends where the prompt does."""
        net, (count, width) = self.module.linear_attn, prefixes.shape
        rows = self.module.input_layernorm(hidden).reshape(count, width, -1)
        memory = mx.zeros((count, net.num_v_heads, net.head_v_dim, net.head_k_dim), mx.float32)
        before = mx.zeros((count, net.conv_kernel_size - 1, net.conv_dim), rows.dtype)
        mixed, memory, inputs = _mix(net, rows, memory, before, prefixes.real)
        # Inputs stand K - 1 places later than their rows.
        places = prefixes.lengths[:, None] + mx.arange(net.conv_kernel_size - 1)
        window = mx.take_along_axis(inputs, places[..., None], axis=1)
        return (hidden if last else self._finish(hidden, mixed)), (memory, window)

    def completion(
        self,
        hidden: mx.array,
        angles: KeysValues,
        shape: tuple[int, int, int],
        prefix: KeysValues,
        masks: Masks,
        own: State | None,
        step: Step | None,
    ) -> mx.array:
        """See `Layer`. Padded rows stand behind all real ones, which do not see them."""
        net, (batch, n, length) = self.module.linear_attn, shape
        rows = self.module.input_layernorm(hidden).reshape(batch * n, length, -1)
        memory, window = (own if own is not None else self.begin(prefix, n)).arrays
        mixed, memory, inputs = _mix(net, rows, memory, window, None)
        if own is not None:
            own.arrays[:] = memory, inputs[:, length:]
        return self._finish(hidden, mixed)

    def begin(self, prefix: KeysValues, n: int) -> State:
        """See `Layer`: the prompt's state, forked."""
        return State([mx.repeat(part, n, axis=0) for part in prefix], len(prefix[0]))

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """See `Layer`."""
        memory, window = (mx.concatenate(list(parts)) for parts in zip(*prefixes, strict=True))
        return memory, window

    def _finish(self, hidden: mx.array, mixed: mx.array) -> mx.array:
        hidden = hidden + self.module.linear_attn.out_proj(mixed.reshape(len(hidden), -1))
        return hidden + feed_forward(self.module.mlp, self.module.post_attention_layernorm(hidden))


def _mix(net: Any, rows: mx.array, memory: mx.array, window: mx.array, real: mx.array | None) -> tuple[mx.array, mx.array, mx.array]:
    """The delta net over `rows` [rows, T, D] behind `memory` and `window`: its output before the projection, the memory after it, and all
    inputs [rows, K - 1 + T, C] of the convolution. `real` [rows, T] is False at padding."""
    projected, before = net.in_proj_qkv(rows), net.conv_kernel_size - 1
    inputs = mx.concatenate([window, projected], axis=1)
    # Cut by `split`: the gradient of a slice is as large as what it was cut from.
    cuts = list(range(SEGMENT, rows.shape[1], SEGMENT))
    parts = [mx.split(part, cuts, axis=1) for part in (projected, net.in_proj_a(rows), net.in_proj_b(rows))]
    reals = [None] * (len(cuts) + 1) if real is None else mx.split(real, cuts, axis=1)
    # Arguments, since what is computed again gives no gradient to what it only finds.
    weights = net.conv1d.weight[..., 0], net.A_log, net.dt_bias
    outputs = []
    for part, decay, beta, kept in zip(*parts, reals, strict=True):
        rule = partial(_rule, net, kept)
        behind = mx.concatenate([window, part], axis=1)
        output, memory = (mx.checkpoint(rule) if cuts else rule)(behind, decay, beta, memory, *weights)
        outputs.append(output)
        window = behind[:, -before:]
    mixed = mx.concatenate(outputs, axis=1) if cuts else outputs[0]
    gate = net.in_proj_z(rows).reshape(mixed.shape)
    return cast("mx.array", net.norm(mixed, gate)), memory, inputs


def _rule(
    net: Any,
    real: mx.array | None,
    inputs: mx.array,
    decay: mx.array,
    beta: mx.array,
    memory: mx.array,
    kernel: mx.array,
    rate: mx.array,
    bias: mx.array,
) -> tuple[mx.array, mx.array]:
    """Convolution and delta rule over projections of T rows, the convolution's behind its window: what is found, and the memory after."""
    from mlx_vlm.models.qwen3_5.gated_delta import gated_delta_chunked, gated_delta_ops

    batch, length = decay.shape[:2]
    # As a sum of shifted inputs, whose gradient is cheap on every device.
    convolved = nn.silu(sum(inputs[:, shift : shift + length] * kernel[:, shift] for shift in range(net.conv_kernel_size)))
    query, key, value = mx.split(convolved, [net.key_dim, 2 * net.key_dim], axis=-1)
    query, key = net._normalize_qk(*(part.reshape(batch, length, net.num_k_heads, -1) for part in (query, key)))
    value = value.reshape(batch, length, net.num_v_heads, -1)
    decay = mx.exp(-mx.exp(rate.astype(mx.float32)) * nn.softplus(decay.astype(mx.float32) + bias))
    beta = mx.sigmoid(beta).astype(mx.float32)
    if length == 1:
        found = gated_delta_ops(query, key, value, decay, beta, memory, real)
    else:
        found = gated_delta_chunked(query, key, value, decay, beta, memory, real, C=min(CHUNK, length))
    return cast("tuple[mx.array, mx.array]", found)
