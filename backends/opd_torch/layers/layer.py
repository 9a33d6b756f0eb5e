"""What a layer of the trunk must do, in the two streams of prompts and completions.

Legend: N packed rows of prompts, M of completions, B prompts, P longest prefix, R completions of
all prompts, n of each where they are as many, T longest completion, D hidden width, H query heads,
G key-value heads, d head width.
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
"""Keys, with positions rotated in, and values: [B, G, P, d] of prefixes, [R, G, T, d] of
completions.

A recurrent layer, which has no keys, gives the two tensors [B, ...] that its completions start
from.
"""

Angles: TypeAlias = Tensor
"""Rotary factors as complex numbers [N, 1, d / 2]; fewer where only a part of a head rotates
(`kernels.rotary`).
"""


class CompletionCache(Protocol):
    """What a layer keeps of each completion's tokens in decoding."""

    def select_rows(self, rows: Tensor) -> None:
        """Keeps the completions `rows`, indices into R."""


class Layer(Protocol):
    """One layer of the trunk, as the two streams run it.

    `module` is transformers'; `rotary` says which of the family's angles it takes, and `visibility`
    which keys its rows see.
    """

    module: Any
    rotary: int
    visibility: Visibility

    def prefix(
        self, hidden: Tensor, angles: Angles, prefixes: Prefixes, last: bool
    ) -> tuple[Tensor, KeysValues]:
        """Runs prompt rows [N, D]: the rows after the layer, and what completions need of them.

        After the `last` layer nobody reads a prompt's rows, so they come back as they were.
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
        """Runs completion rows [M, D] over `prefix`, the result of the layer's `prefix`.

        In a decoding `step` every completion has one row, n to a prompt, and `cache` from `begin`
        holds the rows before; the row is added to the cache in place. Otherwise both are None.
        """

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """The cache of n completions of each prompt before their first tokens."""

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """The results of several calls of `prefix` as those of one call with all prompts."""


def stack_prompts(tensors: Sequence[Tensor]) -> Tensor:
    """[B, ...] from parts [b, ...], with zeros behind what is shorter than the longest.

    The result is contiguous: prefill leaves keys token by token, and a token step wants them head
    by head, or it would copy them every time.
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
    """Calls `function`; if `recompute`, the backward calls it once more instead of keeping its
    activations.
    """
    if recompute and torch.is_grad_enabled():
        output: _Output = checkpoint(function, *inputs, use_reentrant=False)
        return output
    return function(*inputs)
