"""The protocol of a layer of the trunk, which runs prompts and completions in two streams.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens (1 in decoding), H
heads in G groups over H / G key-value heads, E head width, S visual tokens of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

import mlx.core as mx
from mlx.nn.utils import checkpoint

from opd_mlx.batch import Batch, DecodeStep, Masks, Prefixes, Visibility

_Inputs = ParamSpec("_Inputs")
_Output = TypeVar("_Output")

KeysValues: TypeAlias = tuple[mx.array, mx.array]
"""Rotated keys, and values: [B, H / G, P, E] of prefixes, [B, H / G, n, T, E] of completions.

A recurrent layer has the two arrays [B, ...] instead that completions start from.
"""


class CompletionCache(Protocol):
    """A layer's cache of completions in decoding.

    `arrays` is a list of two arrays. The arrays in it are replaced, but the list stays the same.
    """

    arrays: list[mx.array]

    def select_rows(self, prompts: mx.array, columns: mx.array) -> None:
        """Keeps only some `prompts` [B'], and of their completions some `columns` [B', n']."""


class Layer(Protocol):
    """One layer of the trunk.

    `module` is mlx-vlm's layer, `rotary` the index of the layer's angles among the family's, and
    `visibility` says which keys rows attend to.
    """

    module: Any
    rotary: int
    visibility: Visibility

    def prefix(
        self,
        hidden: mx.array,
        angles: KeysValues,
        prefixes: Prefixes,
        mask: mx.array | None,
        last: bool,
    ) -> tuple[mx.array, KeysValues]:
        """Runs prompt rows [B * P, D]; returns the rows after the layer, and the prompts' cache.

        Nothing reads a prompt's rows after the `last` layer, so that layer returns them unchanged.
        `mask` is `Prefixes.mask` of the layer's visibility.
        """

    def completion(
        self,
        hidden: mx.array,
        angles: KeysValues,
        shape: tuple[int, int, int],
        prefix: KeysValues,
        masks: Masks,
        cache: Any,
        step: DecodeStep | None,
    ) -> mx.array:
        """Runs completion rows [B * n * T, D] over `prefix`, the cache that the method `prefix`
        returned; `shape` is (B, n, T).

        In a decoding `step` T is 1. `cache`, which `begin` made, holds the earlier rows, and the
        row is added to it in place. Otherwise both are None.
        """

    def visual_weights(
        self, hidden: mx.array, angles: KeysValues, prefix: KeysValues, batch: Batch, masks: Masks
    ) -> list[mx.array] | None:
        """The attention weights [n, T, S] of the completions' rows on the visual tokens of each
        prompt, averaged over heads; the inputs are those of `completion`. None for a layer without
        keys.
        """

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """The cache of n completions of each prompt, before the first token."""

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """Joins the caches of several calls of `prefix` into that of one call with all prompts."""


def checkpoint_if(
    recompute: bool, module: Any, function: Callable[_Inputs, _Output]
) -> Callable[_Inputs, _Output]:
    """Returns `function`, which computes with `module`'s parameters. If `recompute`, the returned
    function keeps no activations, and the backward calls `function` once more.
    """
    if not recompute:
        return function
    checkpointed: Callable[_Inputs, _Output] = checkpoint(module, function)
    return checkpointed
