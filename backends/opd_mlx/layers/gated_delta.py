"""Gated delta nets (arXiv 2412.06464), which keep a state instead of keys and values.

A prompt leaves a recurrent state, and the last inputs of the short convolution; the prompt's n
completions start from them. mlx-vlm computes the delta rule, in chunks.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens, K width of the
convolution's kernel, C channels of the convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import mlx.nn as nn

from opd_mlx.batch import Batch, DecodeStep, Masks, Prefixes, Visibility
from opd_mlx.device import Device
from opd_mlx.layers.attention import feed_forward
from opd_mlx.layers.layer import CompletionCache, KeysValues
from opd_mlx.layers.modules import DecoderLayer, DeltaNet

CHUNK = 64
"""The rows that the delta rule solves together."""


@dataclass
class _State:
    """The cache of completions: the state [B * n, heads, value width, key width] in float32, and
    the last inputs [B * n, K - 1, C] of the convolution.
    """

    arrays: list[mx.array]
    prompts: int

    def select_rows(self, prompts: mx.array, columns: mx.array) -> None:
        """Keeps only some prompts [B'], and of their completions some columns [B', n']."""
        n = len(self.arrays[0]) // self.prompts
        rows = (prompts[:, None] * n + columns).reshape(-1)
        self.arrays[:], self.prompts = [part[rows] for part in self.arrays], len(prompts)


class GatedDelta:
    """A layer of gated delta net and feed-forward; `layers.layer.Layer` describes the public
    methods.

    Instead of keys and values, a prompt leaves the state and the convolution's last inputs,
    [B, ...].
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
        """Runs prompt rows [B * P, D].

        Padding leaves the state as it is: it neither decays the state nor writes to it, and the
        window ends with the prompt's last row.
        """
        net, (count, width) = self.module.linear_attn, prefixes.shape
        rows = self.module.input_layernorm(hidden).reshape(count, width, -1)
        state = mx.zeros((count, net.num_v_heads, net.head_v_dim, net.head_k_dim), mx.float32)
        before = mx.zeros((count, net.conv_kernel_size - 1, net.conv_dim), rows.dtype)
        mixed, state, inputs = self._mix(rows, state, before, prefixes.real)
        # Row t's input is at place t + K - 1, behind the zeros before the prompt.
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
        """Runs completion rows [B * n * T, D], or in a `step` the next row of every completion.

        Padding is behind all real rows, so it does not reach them.
        """
        batch, n, length = shape
        rows = self.module.input_layernorm(hidden).reshape(batch * n, length, -1)
        state, window = (cache if cache is not None else self.begin(prefix, n)).arrays
        mixed, state, inputs = self._mix(rows, state, window, None)
        if cache is not None:
            cache.arrays[:] = state, inputs[:, length:]
        return self._finish(hidden, mixed)

    def visual_weights(
        self, hidden: mx.array, angles: KeysValues, prefix: KeysValues, batch: Batch, masks: Masks
    ) -> None:
        """None: a delta net has no keys."""

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """Copies each prompt's state for each of n completions."""
        return _State([mx.repeat(part, n, axis=0) for part in prefix], len(prefix[0]))

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """The states of all prompts."""
        state, window = (mx.concatenate(list(parts)) for parts in zip(*prefixes, strict=True))
        return state, window

    def _finish(self, hidden: mx.array, mixed: mx.array) -> mx.array:
        hidden = hidden + self.module.linear_attn.out_proj(mixed.reshape(len(hidden), -1))
        return hidden + feed_forward(self.module.mlp, self.module.post_attention_layernorm(hidden))

    def _mix(
        self, rows: mx.array, state: mx.array, window: mx.array, real: mx.array | None
    ) -> tuple[mx.array, mx.array, mx.array]:
        """Runs the net over `rows` [rows, T, D], from `state` and `window`.

        Returns the output before the output projection, the state at the end, and all inputs
        [rows, K - 1 + T, C] of the convolution. `real` [rows, T] is False at padding.
        """
        net = self.module.linear_attn
        projected, before = net.in_proj_qkv(rows), net.conv_kernel_size - 1
        inputs = mx.concatenate([window, projected], axis=1)
        # `split`, because the gradient of a slice is as large as the whole array.
        cuts = list(range(self._segment, rows.shape[1], self._segment))
        whole = (projected, net.in_proj_a(rows), net.in_proj_b(rows))
        parts = [mx.split(part, cuts, axis=1) for part in whole]
        reals = [None] * (len(cuts) + 1) if real is None else mx.split(real, cuts, axis=1)
        # Arguments, because `mx.checkpoint` drops the gradient of arrays in a closure.
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
    """Runs convolution and delta rule over T rows; returns the output and the state at the end.

    `inputs` [rows, K - 1 + T, C] of the convolution begin with the window.
    """
    from mlx_vlm.models.qwen3_5.gated_delta import gated_delta_chunked, gated_delta_ops

    batch, length = decay.shape[:2]
    # The convolution as a sum of shifted inputs, whose gradient is cheap on every device.
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
