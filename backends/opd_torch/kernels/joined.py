"""Attention of completions over the keys of prompt and completion, without a copy of the prompt's
keys for each completion.

torch's fused kernel (`kernels.flash`) runs twice: all rows of a prompt's completions attend to the
prompt's keys, and each completion attends causally to the completion's keys. The logarithms of the
two sums join the two softmaxes. In the backward each kernel gets the joint output and the joint
logarithm; it then computes exactly its part of the whole gradient (as in ring attention, arXiv
2310.01889).

CUDA's kernel takes no bias, so prompts of unequal lengths run one after the other there.

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
"""Packed rows, the layout of these rows, prompts, number of keys, and bias."""


def joined(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prefix_key: Tensor,
    prefix_value: Tensor,
    batch: Batch,
    scale: float,
) -> Tensor:
    """Attention [M, H, d] of completion rows `query` [M, H, d] over the prompts' keys and values
    [B, G, P, d] and the completions' [M, G, d].
    """
    mixed: Tensor = _Joined.apply(query, key, value, prefix_key, prefix_value, batch, scale)
    return mixed


class _Context(Context, Protocol):
    for_backward: list[flash.ForBackward]
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
        queries, keys, values = (ragged.pad(x).transpose(1, 2) for x in (query, key, value))
        out, out_sum, for_backward = flash.attention(queries, keys, values, None, True, scale)
        of_completion, completion_total = (ragged.unpad(x.transpose(1, 2)) for x in (out, out_sum))
        outs, sums, ctx.for_backward = [], [], [for_backward]
        for rows, layout, prompts, length, bias in _parts(batch, query):
            queries = layout.pad(query[rows]).transpose(1, 2)
            keys, values = (x[prompts, :, :length] for x in (prefix_key, prefix_value))
            out, out_sum, for_backward = flash.attention(queries, keys, values, bias, False, scale)
            outs.append(layout.unpad(out.transpose(1, 2)))
            sums.append(layout.unpad(out_sum.transpose(1, 2)))
            ctx.for_backward.append(for_backward)
        of_prefix, prefix_total = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, sums))
        joint = torch.logaddexp(completion_total, prefix_total)
        share = torch.sigmoid(prefix_total - completion_total)[..., None]
        of_completion, of_prefix = (x.to(share.dtype) for x in (of_completion, of_prefix))
        mixed = torch.lerp(of_completion, of_prefix, share).to(query.dtype)
        ctx.batch, ctx.scale = batch, scale
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, mixed, joint)
        return mixed

    @staticmethod
    def backward(ctx: _Context, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prefix_key, prefix_value, mixed, joint = ctx.saved_tensors
        ragged, for_backward = ctx.batch.ragged, iter(ctx.for_backward)

        def back(
            layout: Ragged, rows: slice, keys: Sequence[Tensor], bias: Tensor | None, causal: bool
        ) -> tuple[Tensor, ...]:
            inputs = (layout.pad(x[rows]).transpose(1, 2) for x in (gradient, query, mixed))
            out_gradient, queries, out = inputs
            # An infinite sum makes the weights of padding 0, and so the gradient, whatever the
            # scores there. CUDA's kernel assumes contiguous sums and ignores strides.
            totals = layout.fill(joint[rows], float("inf")).transpose(1, 2).contiguous()
            key, value = keys
            query_gradient, *others = flash.attention_backward(
                out_gradient,
                queries,
                key,
                value,
                out,
                totals,
                next(for_backward),
                bias,
                causal,
                ctx.scale,
            )
            return layout.unpad(query_gradient.transpose(1, 2)), *others

        completion = [ragged.pad(x).transpose(1, 2) for x in (key, value)]
        of_query, *of_completion = back(ragged, slice(None), completion, None, True)
        of_key, of_value = (ragged.unpad(x.transpose(1, 2)) for x in of_completion)
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
    """Yields the parts that run together over the prompts' keys: packed rows, the rows' layout,
    prompts, the number of keys, and the bias.
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
