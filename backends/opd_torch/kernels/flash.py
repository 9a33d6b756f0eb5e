"""torch's fused attention through private operators, because `scaled_dot_product_attention` does
not return the logarithms of sums.

The four operators have the arguments of torch 2.13: `_scaled_dot_product_flash_attention` and
`_scaled_dot_product_flash_attention_backward` on CUDA, and the same two with `_for_cpu` on a CPU.
Another version of torch may change them without notice; then test_joined.py in
`tests/backends/torch/` fails on a CPU, and test_cuda.py on CUDA.

Legend: X rows of a padded layout of T queries and S keys each, H query heads, G key-value heads, d
head width.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

ForBackward: TypeAlias = tuple[Tensor | int, ...]
"""Results that only the backward reads: six tensors and sizes on CUDA, nothing on a CPU."""


def joinable(query: Tensor, key: Tensor) -> bool:
    """Whether a kernel takes these packed queries and keys, [rows, H or G, d]."""
    if query.device.type != "cuda":
        return query.device.type in ("cpu", "meta")
    if query.shape[-1] % 8:  # `scaled_dot_product_attention` would pad such heads
        return False
    one_query, one_key = (x[None].transpose(1, 2) for x in (query, key))
    parameters = torch.backends.cuda.SDPAParams(one_query, one_key, one_key, None, 0.0, False, True)
    return bool(torch.backends.cuda.can_use_flash_attention(parameters))


def takes_bias(query: Tensor) -> bool:
    """Whether the kernel takes a bias, which hides padded keys; without one, prompts of unequal
    lengths run one after the other.
    """
    return not query.is_cuda


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, ForBackward]:
    """Attention [X, H, T, d] of `query` over `key` and `value` [X, G, S, d]; `bias` [X, 1, 1, S] is
    added to the scores.

    Also returns the natural logarithm of each row's sum of exponentials [X, H, T], and results for
    `attention_backward`.
    """
    if query.is_cuda:
        assert bias is None
        out, totals, *rest = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return out, totals, tuple(rest[:6])
    out, totals = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=bias, scale=scale
    )
    return out, totals, ()


def attention_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    totals: Tensor,
    for_backward: ForBackward,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, from the `gradient` of `out` [X, H, T, d]."""
    inputs = gradient, query, key, value, out, totals
    gradients: tuple[Tensor, Tensor, Tensor]
    if query.is_cuda:
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *inputs, *for_backward[:4], 0.0, causal, *for_backward[4:], scale=scale
        )
    else:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, 0.0, causal, attn_mask=bias, scale=scale
        )
    return gradients
