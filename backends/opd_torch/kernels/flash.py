"""torch's fused attention by private operators, since `scaled_dot_product_attention` does not
give the logarithms of sums.

All four, and their arguments, are those of torch 2.13: `_scaled_dot_product_flash_attention`
and its backward on CUDA, and both with the ending `_for_cpu` on a CPU. Another torch may change
them without notice; then test_joined.py in `tests/backends/torch/` fails on a CPU, and test_cuda.py
on CUDA.

Legend: X rows of a padded layout of T queries and S keys each, H query heads, G key-value heads, d
head width.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

Kept: TypeAlias = tuple[Tensor | int, ...]
"""What only the backward reads: of the CUDA kernel six tensors and sizes, of the CPU's nothing."""


def joinable(query: Tensor, key: Tensor) -> bool:
    """Whether there is a kernel for these packed queries and keys, [rows, H or G, d]."""
    if query.device.type != "cuda":
        return query.device.type in ("cpu", "meta")
    if query.shape[-1] % 8:  # torch's own front would pad such heads
        return False
    one_query, one_key = (x[None].transpose(1, 2) for x in (query, key))
    parameters = torch.backends.cuda.SDPAParams(one_query, one_key, one_key, None, 0.0, False, True)
    return bool(torch.backends.cuda.can_use_flash_attention(parameters))


def takes_bias(query: Tensor) -> bool:
    """Whether the kernel can leave out padded keys; where it cannot, prompts of unequal lengths run
    one by one.
    """
    return not query.is_cuda


def attention(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Kept]:
    """Attention [X, H, T, d] of `query` over `key` and `value` [X, G, S, d]; `bias` [X, 1, 1, S] is
    added to scores.

    Also the natural logarithm of each row's sum of exponentials [X, H, T], and what only
    `attention_backward` reads.
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
    kept: Kept,
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, from the gradient to `out` [X, H, T, d]."""
    inputs = gradient, query, key, value, out, totals
    gradients: tuple[Tensor, Tensor, Tensor]
    if query.is_cuda:
        gradients = aten._scaled_dot_product_flash_attention_backward(
            *inputs, *kept[:4], 0.0, causal, *kept[4:], scale=scale
        )
    else:
        gradients = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, 0.0, causal, attn_mask=bias, scale=scale
        )
    return gradients
