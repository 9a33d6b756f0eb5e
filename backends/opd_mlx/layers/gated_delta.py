"""Gated delta nets, which keep a state instead of keys.

A prompt's n completions start from its state, and from the last inputs of the short convolution.
The delta rule in chunks is mlx-vlm's.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens, K kernel of the
convolution, C its channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from opd_mlx.batch import DecodeStep, Masks, Prefixes, Visibility
from opd_mlx.device import Device
from opd_mlx.layers.attention import feed_forward
from opd_mlx.layers.layer import CompletionCache, KeysValues
from opd_mlx.layers.modules import DecoderLayer, DeltaNet

CHUNK = 64
"""Tokens that the delta rule solves together."""


@dataclass
class _State:
    """In decoding: the state [B * n, heads, value width, key width] in float32, and the last inputs
    [B * n, K - 1, C] of the convolution."""

    arrays: list[mx.array]
    prompts: int

    def select_rows(self, prompts: mx.array, columns: mx.array) -> None:
        """Keeps some prompts, and of their completions some columns."""
        n = len(self.arrays[0]) // self.prompts
        rows = (prompts[:, None] * n + columns).reshape(-1)
        self.arrays[:], self.prompts = [part[rows] for part in self.arrays], len(prompts)


class GatedDelta:
    """A recurrent `Layer`.

    Its "keys and values" are the state and the convolution's window after each prompt, [B, ...].
    """

    rotary = 0
    visibility = Visibility()

    def __init__(self, module: DecoderLayer, device: Device) -> None:
        self.module, self._segment = module, device.delta_segment

    def prefix(
        self,
        hidden: mx.array,
        angles: KeysValues,
        prefixes: Prefixes,
        mask: mx.array | None,
        last: bool,
    ) -> tuple[mx.array, KeysValues]:
        """Prompt rows after the layer, and what completions start from.

        Padding changes no state: it neither decays nor writes, and the window ends with the prompt.
        """
        net, (count, width) = self.module.linear_attn, prefixes.shape
        rows = self.module.input_layernorm(hidden).reshape(count, width, -1)
        state = mx.zeros((count, net.num_v_heads, net.head_v_dim, net.head_k_dim), mx.float32)
        before = mx.zeros((count, net.conv_kernel_size - 1, net.conv_dim), rows.dtype)
        mixed, state, inputs = self._mix(rows, state, before, prefixes.real)
        # Inputs stand K - 1 places later than their rows.
        places = prefixes.lengths[:, None] + mx.arange(net.conv_kernel_size - 1)
        window = mx.take_along_axis(inputs, places[..., None], axis=1)
        return (hidden if last else self._finish(hidden, mixed)), (state, window)

    def completion(
        self,
        hidden: mx.array,
        angles: KeysValues,
        shape: tuple[int, int, int],
        prefix: KeysValues,
        masks: Masks,
        cache: _State | None,
        step: DecodeStep | None,
    ) -> mx.array:
        """Completion rows after the layer. Padded rows stand behind all real ones."""
        batch, n, length = shape
        rows = self.module.input_layernorm(hidden).reshape(batch * n, length, -1)
        state, window = (cache if cache is not None else self.begin(prefix, n)).arrays
        mixed, state, inputs = self._mix(rows, state, window, None)
        if cache is not None:
            cache.arrays[:] = state, inputs[:, length:]
        return self._finish(hidden, mixed)

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """The prompt's state, once for each completion."""
        return _State([mx.repeat(part, n, axis=0) for part in prefix], len(prefix[0]))

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """All states and windows."""
        state, window = (mx.concatenate(list(parts)) for parts in zip(*prefixes, strict=True))
        return state, window

    def _finish(self, hidden: mx.array, mixed: mx.array) -> mx.array:
        hidden = hidden + self.module.linear_attn.out_proj(mixed.reshape(len(hidden), -1))
        return hidden + feed_forward(self.module.mlp, self.module.post_attention_layernorm(hidden))

    def _mix(
        self, rows: mx.array, state: mx.array, window: mx.array, real: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """The delta net over `rows` [rows, T, D] that follow `state` and `window`.

        Returns its output before the projection, the state after it, and all inputs
        [rows, K - 1 + T, C] of the convolution. `real` [rows, T] is False at padding.
        """
        net = self.module.linear_attn
        projected, before = net.in_proj_qkv(rows), net.conv_kernel_size - 1
        inputs = mx.concatenate([window, projected], axis=1)
        # Cut by `split`: the gradient of a slice is as large as what it was cut from.
        cuts = list(range(self._segment, rows.shape[1], self._segment))
        whole = (projected, net.in_proj_a(rows), net.in_proj_b(rows))
        parts = [mx.split(part, cuts, axis=1) for part in whole]
        reals = [None] * (len(cuts) + 1) if real is None else mx.split(real, cuts, axis=1)
        # Arguments, since a checkpoint gives no gradient to what its function closes over.
        weights = net.conv1d.weight[..., 0], net.A_log, net.dt_bias
        outputs = []
        for part, decay, beta, real_part in zip(*parts, reals, strict=True):
            rule = partial(_rule, net, real_part)
            following = mx.concatenate([window, part], axis=1)
            output, state = (mx.checkpoint(rule) if cuts else rule)(
                following, decay, beta, state, *weights
            )
            outputs.append(output)
            window = following[:, -before:]
        mixed = mx.concatenate(outputs, axis=1) if cuts else outputs[0]
        gate = net.in_proj_z(rows).reshape(mixed.shape)
        return net.norm(mixed, gate), state, inputs


def _rule(
    net: DeltaNet,
    real: mx.array | None,
    inputs: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array,
    kernel: mx.array,
    rate: mx.array,
    bias: mx.array,
) -> tuple[mx.array, mx.array]:
    """Convolution and delta rule over projections of T rows: the output, and the state after it.

    `inputs` of the convolution begin with its window.
    """
    from mlx_vlm.models.qwen3_5.gated_delta import gated_delta_chunked, gated_delta_ops

    batch, length = decay.shape[:2]
    # As a sum of shifted inputs, whose gradient is cheap on every device.
    shifted = (
        inputs[:, shift : shift + length] * kernel[:, shift]
        for shift in range(net.conv_kernel_size)
    )
    convolved: mx.array = nn.silu(sum(shifted))
    query, key, value = mx.split(convolved, [net.key_dim, 2 * net.key_dim], axis=-1)
    heads = (part.reshape(batch, length, net.num_k_heads, -1) for part in (query, key))
    query, key = net._normalize_qk(*heads)
    value = value.reshape(batch, length, net.num_v_heads, -1)
    softplus: mx.array = nn.softplus(decay.astype(mx.float32) + bias)
    decay = mx.exp(-mx.exp(rate.astype(mx.float32)) * softplus)
    beta = mx.sigmoid(beta).astype(mx.float32)
    result: tuple[mx.array, mx.array]
    if length == 1:
        result = gated_delta_ops(query, key, value, decay, beta, state, real)
    else:
        chunk = min(CHUNK, length)
        result = gated_delta_chunked(query, key, value, decay, beta, state, real, C=chunk)
    return result
