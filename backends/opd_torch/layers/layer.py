"""The protocol of a layer of the trunk, which runs prompts and completions in two streams.

Legend: N packed rows of prompts, M packed rows of completions, B prompts, P longest prefix, R
completions of all prompts, n completions of each prompt where they are equally many, T longest
completion, D hidden width, H query heads, G key-value heads, d head width, S visual tokens of one
prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar, TypeVarTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from opd_torch.batch import Batch, DecodeStep, Prefixes, Visibility

_Inputs = TypeVarTuple("_Inputs")
_Output = TypeVar("_Output")

KeysValues: TypeAlias = tuple[Tensor, Tensor]
"""Rotated keys, and values: [B, G, P, d] of prefixes, [R, G, T, d] of completions.

A recurrent layer has the two tensors [B, ...] instead that completions start from.
"""

Angles: TypeAlias = Tensor
"""Rotary factors as complex numbers [N, 1, w / 2], if w of a head's d numbers rotate
(`kernels.rotary`).
"""


class CompletionCache(Protocol):
    """A layer's cache of completions in decoding."""

    def select_rows(self, rows: Tensor) -> None:
        """Keeps only the completions `rows`, indices into R."""


class Layer(Protocol):
    """One layer of the trunk.

    `module` is transformers' layer, `rotary` the index of the layer's angles among the family's,
    and `visibility` says which keys rows attend to.
    """

    module: Any
    rotary: int
    visibility: Visibility

    def prefix(
        self, hidden: Tensor, angles: Angles, prefixes: Prefixes, last: bool
    ) -> tuple[Tensor, KeysValues]:
        """Runs prompt rows [N, D]; returns the rows after the layer, and the prompts' cache.

        Nothing reads a prompt's rows after the `last` layer, so that layer returns them unchanged.
        """

    def completion(
        self,
        hidden: Tensor,
        angles: Angles,
        prefix: KeysValues,
        batch: Batch,
        cache: Any = None,
        step: DecodeStep | None = None,
    ) -> Tensor:
        """Runs completion rows [M, D] over `prefix`, the cache that the method `prefix` returned.

        In a decoding `step` each of a prompt's n completions has one row. `cache`, which `begin`
        made, holds the earlier rows, and the row is added to it in place. Otherwise both are None.
        """

    def visual_weights(
        self, hidden: Tensor, angles: Angles, prefix: KeysValues, batch: Batch
    ) -> list[Tensor] | None:
        """The attention weights [T, S] of each completion's rows on the visual tokens of its
        prompt, averaged over heads; the inputs are those of `completion`. None for a layer without
        keys.
        """

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """The cache of n completions of each prompt, before the first token."""

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """Joins the caches of several calls of `prefix` into that of one call with all prompts."""


def stack_prompts(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates parts [b, ...] to [B, ...], padded with zeros to the longest part.

    The result is contiguous. Prefill leaves keys in the order of tokens, and every token step would
    copy them to the order of heads.
    """
    if len(tensors) == 1:
        return tensors[0].contiguous()
    sizes = [tensor.shape for tensor in tensors]
    longest = map(max, zip(*(size[1:] for size in sizes), strict=True))
    out = tensors[0].new_zeros(sum(size[0] for size in sizes), *longest)
    for tensor, place in zip(tensors, torch.split(out, [size[0] for size in sizes]), strict=True):
        place[tuple(map(slice, tensor.shape))] = tensor
    return out


def checkpoint_if(
    recompute: bool, function: Callable[[*_Inputs], _Output], *inputs: *_Inputs
) -> _Output:
    """Calls `function`. If `recompute`, the forward keeps no activations, and the backward calls
    `function` once more.
    """
    if recompute and torch.is_grad_enabled():
        output: _Output = checkpoint(function, *inputs, use_reentrant=False)
        return output
    return function(*inputs)
