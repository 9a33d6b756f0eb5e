"""Attention of completions over their prompt's keys and their own, without a copy of the prompt's
keys for each completion.

Two attentions, each by torch's fused kernel (`kernels.flash`): all rows of a prompt's completions
over the prompt's keys, and each completion over its own keys, causally. The logarithms of their
sums join their softmaxes. In the backward each kernel gets the joint output and the joint
logarithm, with which its gradient is exactly its part of the whole gradient (as in ring attention,
arXiv 2310.01889).

CUDA's kernel takes half precision and no mask, so prompts of unequal lengths run one by one there.

Legend: M packed rows of completions, B prompts, P longest prefix, H query heads, G key-value heads,
d head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from opd_torch.batch import Batch
from opd_torch.kernels import flash
from opd_torch.kernels.function import Context, Function
from opd_torch.ragged import Ragged

Part = tuple[slice, Ragged, slice, int, Tensor | None]


def joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    batch: Batch,
    scale: float,
) -> Tensor:
    """Attention of completion rows `query` [M, H, d] over their prompt's keys [B, G, P, d] and
    their own [M, G, d]: [M, H, d].
    """
    mixed: Tensor = _Joined.apply(query, key, value, prefix_key, prefix_value, batch, scale)
    return mixed


class _Context(Context, Protocol):
    kept: list[flash.Kept]
    batch: Batch
    scale: float


class _Joined(Function):
    @staticmethod
    def forward(
        ctx: _Context,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        batch: Batch,
        scale: float,
    ) -> Tensor:
        ragged = batch.ragged
        own_key, own_value = (ragged.pad(x).transpose(1, 2) for x in (key, value))
        queries = ragged.pad(query).transpose(1, 2)
        own, total, kept = flash.attention(queries, own_key, own_value, None, True, scale)
        own, total = (ragged.unpad(x.transpose(1, 2)) for x in (own, total))
        outs, sums, ctx.kept = [], [], [kept]
        for rows, layout, prompts, length, bias in _parts(batch, query):
            queries = layout.pad(query[rows]).transpose(1, 2)
            keys, values = (x[prompts, :, :length] for x in (prefix_key, prefix_value))
            out, part_sum, kept = flash.attention(queries, keys, values, bias, False, scale)
            outs.append(layout.unpad(out.transpose(1, 2)))
            sums.append(layout.unpad(part_sum.transpose(1, 2)))
            ctx.kept.append(kept)
        before, prefix_total = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, sums))
        joint = torch.logaddexp(total, prefix_total)
        share = torch.sigmoid(prefix_total - total)[..., None]
        mixed = torch.lerp(own.to(share.dtype), before.to(share.dtype), share).to(query.dtype)
        ctx.batch, ctx.scale = batch, scale
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mixed, joint)
        return mixed

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, mixed, joint = ctx.saved_tensors
        ragged, kept = ctx.batch.ragged, iter(ctx.kept)

        def back(
            layout: Ragged, rows: slice, keys: Sequence[Tensor], bias: Tensor | None, causal: bool
        ) -> tuple[Tensor, ...]:
            inputs = (layout.pad(x[rows]).transpose(1, 2) for x in (gradient, query, mixed))
            out_gradient, queries, out = inputs
            # Divided by an infinite sum, padding has no weights and thus no gradient, whatever its
            # scores are. CUDA's kernel reads the sums as contiguous, whatever their strides.
            totals = layout.fill(joint[rows], float("inf")).transpose(1, 2).contiguous()
            key, value = keys
            query_gradient, *others = flash.attention_backward(
                out_gradient, queries, key, value, out, totals, next(kept), bias, causal, ctx.scale
            )
            return layout.unpad(query_gradient.transpose(1, 2)), *others

        own = [ragged.pad(x).transpose(1, 2) for x in (key, value)]
        of_query, *of_own = back(ragged, slice(None), own, None, True)
        of_key, of_value = (ragged.unpad(x.transpose(1, 2)) for x in of_own)
        of_prefix: list[Tensor] = []
        for rows, layout, prompts, length, bias in _parts(ctx.batch, query):
            before = [x[prompts, :, :length] for x in (prefix_key, prefix_value)]
            query_gradient, *prefix_gradients = back(layout, rows, before, bias, False)
            of_query[rows] += query_gradient
            if prompts == slice(None):
                of_prefix = prefix_gradients
            else:
                of_prefix = of_prefix or [torch.zeros_like(x) for x in (prefix_key, prefix_value)]
                for whole, part in zip(of_prefix, prefix_gradients, strict=True):
                    whole[prompts, :, :length] = part
        return of_query, of_key, of_value, *of_prefix, None, None


def _parts(batch: Batch, query: Tensor) -> Iterator[Part]:
    """Packed rows that run together over their prompts' keys: the rows and their layout, the
    prompts, how many keys, and their bias.
    """
    prefixes = batch.prefixes.ragged
    if prefixes.even or flash.takes_bias(query):
        bias = batch.prefixes.bias(query.dtype)
        yield slice(None), batch.prompts, slice(None), prefixes.longest, bias
        return
    start = 0
    sizes = zip(batch.prompts.lengths.tolist(), prefixes.lengths.tolist(), strict=True)
    for prompt, (count, length) in enumerate(sizes):
        if count:
            layout = Ragged(np.array([count]), query.device)
            yield slice(start, start + count), layout, slice(prompt, prompt + 1), length, None
            start += count
