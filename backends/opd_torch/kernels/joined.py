"""Attention of completions over their prompt's keys and their own without a copy of the prompt's keys for each completion.

Two attentions, each by torch's fused kernel: all rows of a prompt's completions over the prompt's keys, and each completion over its own,
causally. Their softmaxes are joined through the logarithms of their sums. In the backward each kernel is given the joint output and the
joint logarithm, with which its gradient is exactly its part of the whole one's (as in ring attention, arXiv 2310.01889).

The kernels are called by name, since `scaled_dot_product_attention` does not give the logarithms. On CUDA that is flash attention, in half
precision; it takes no mask, so prompts of unequal lengths run one by one there.

Legend: M packed rows of completions, B prompts, P longest prefix, X rows of a padded layout of T queries and S keys each, H query heads,
G key-value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opd_torch.batch import Batch
from opd_torch.ragged import Ragged

aten = torch.ops.aten


def joinable(query: Tensor, key: Tensor) -> bool:
    """Whether there is a kernel for these packed queries and keys."""
    if query.device.type != "cuda":
        return query.device.type in ("cpu", "meta")
    if query.shape[-1] % 8:  # which torch's own front would pad
        return False
    row, its = (x[None].transpose(1, 2) for x in (query, key))
    return bool(torch.backends.cuda.can_use_flash_attention(torch.backends.cuda.SDPAParams(row, its, its, None, 0.0, False, True)))


def takes_bias(query: Tensor) -> bool:
    """Whether the kernel can leave out padded keys; where it cannot, prompts of unequal lengths run one by one."""
    return not query.is_cuda


def joined(query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, batch: Batch, scale: float) -> Tensor:
    """What completion rows find [M, H, d] by `query` [M, H, d], in their prompt's keys [B, G, P, d] and in their own [M, G, d]."""
    mixed: Tensor = _Joined.apply(query, key, value, prefix_key, prefix_value, batch, scale)
    return mixed


class _Joined(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
    """See the module."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, prefix_key: Tensor, prefix_value: Tensor, batch: Batch, scale: float
    ) -> Tensor:
        rows = batch.ragged
        own_key, own_value = (rows.pad(x).transpose(1, 2) for x in (key, value))
        own, total, kept = fused(rows.pad(query).transpose(1, 2), own_key, own_value, None, True, scale)
        own, total = rows.unpad(own.transpose(1, 2)), rows.unpad(total.transpose(1, 2))
        found, totals, ctx.kept = [], [], [kept]
        for part, its, prompts, length, bias in _parts(batch, query):
            queries = its.pad(query[part]).transpose(1, 2)
            out, sums, kept = fused(queries, prefix_key[prompts, :, :length], prefix_value[prompts, :, :length], bias, False, scale)
            found.append(its.unpad(out.transpose(1, 2)))
            totals.append(its.unpad(sums.transpose(1, 2)))
            ctx.kept.append(kept)
        before, sums = (x[0] if len(x) == 1 else torch.cat(x) for x in (found, totals))
        joint = torch.logaddexp(total, sums)
        share = torch.sigmoid(sums - total)[..., None]
        mixed = torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)
        ctx.batch, ctx.scale = batch, scale
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mixed, joint)
        return mixed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, mixed, joint = ctx.saved_tensors
        rows, kept = ctx.batch.ragged, iter(ctx.kept)

        def back(its: Ragged, part: slice, keys: Sequence[Tensor], bias: Tensor | None, causal: bool) -> tuple[Tensor, ...]:
            asked, queries, found = (its.pad(x[part]).transpose(1, 2) for x in (gradient, query, mixed))
            # Divided by an infinite sum, padding has no weights and thus no gradient, whatever its scores are.
            # The kernel of CUDA reads the sums one behind the other, however they stand.
            totals = its.fill(joint[part], float("inf")).transpose(1, 2).contiguous()
            its_query, *rest = fused_backward(asked, queries, keys[0], keys[1], found, totals, next(kept), bias, causal, ctx.scale)
            return its.unpad(its_query.transpose(1, 2)), *rest

        own = [rows.pad(x).transpose(1, 2) for x in (key, value)]
        of_query, *of_own = back(rows, slice(None), own, None, True)
        of_key, of_value = (rows.unpad(x.transpose(1, 2)) for x in of_own)
        of_prefix: list[Tensor] = []
        for part, its, prompts, length, bias in _parts(ctx.batch, query):
            before = [x[prompts, :, :length] for x in (prefix_key, prefix_value)]
            its_query, *its_prefix = back(its, part, before, bias, False)
            of_query[part] += its_query
            if prompts == slice(None):
                of_prefix = its_prefix
            else:
                of_prefix = of_prefix or [torch.zeros_like(x) for x in (prefix_key, prefix_value)]
                for whole, found in zip(of_prefix, its_prefix, strict=True):
                    whole[prompts, :, :length] = found
        return of_query, of_key, of_value, *of_prefix, None, None


def _parts(batch: Batch, query: Tensor) -> Iterator[tuple[slice, Ragged, slice, int, Tensor | None]]:
    """Packed rows that run together over their prompts' keys: which rows, their layout, which prompts, how many keys, and their bias."""
    prefixes = batch.prefixes.ragged
    if prefixes.even or takes_bias(query):
        yield slice(None), batch.prompts, slice(None), prefixes.longest, batch.prefixes.bias(query.dtype)
        return
    start = 0
    for prompt, (count, length) in enumerate(zip(batch.prompts.lengths.tolist(), prefixes.lengths.tolist(), strict=True)):
        if count:
            its = Ragged(np.array([count]), query.device)
            yield slice(start, start + count), its, slice(prompt, prompt + 1), length, None
            start += count


def fused(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Attention [X, H, T, d] of `query` over `key` and `value` [X, G, S, d], the natural logarithm of each row's sum of exponentials
    [X, H, T], and what the backward wants beside them. `bias` [X, 1, 1, S] is added to scores.
    """
    if query.is_cuda:
        assert bias is None
        out, totals, *rest = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, causal, False, scale=scale)
        return out, totals, tuple(rest[:6])
    out, totals = aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
    return out, totals, ()


def fused_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    totals: Tensor,
    kept: tuple[Any, ...],
    bias: Tensor | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to query, key and value, from the gradient to `out` [X, H, T, d]."""
    inputs = gradient, query, key, value, out, totals
    if query.is_cuda:
        of: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_backward(
            *inputs, *kept[:4], 0.0, causal, *kept[4:], scale=scale
        )
    else:
        of = aten._scaled_dot_product_flash_attention_for_cpu_backward(*inputs, 0.0, causal, attn_mask=bias, scale=scale)
    return of
