"""A layer of the trunk, as the two streams of prompts and completions run it.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens (1 in decoding), H
heads in G groups over H / G key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, Protocol, TypeAlias, TypeVar

import mlx.core as mx
from mlx.nn.utils import checkpoint

from opd_mlx.batch import DecodeStep, Masks, Prefixes, Visibility

_Inputs = ParamSpec("_Inputs")
_Output = TypeVar("_Output")

KeysValues: TypeAlias = tuple[mx.array, mx.array]
"""Keys, with positions rotated in, and values: [B, H / G, P, E] of prompts, and of completions
[B, H / G, n, T, E]. For a recurrent layer: whatever two arrays its completions start from."""


class CompletionCache(Protocol):
    """What a layer keeps of the tokens decoded so far.

    `arrays` is one list of two arrays; it stays the same list while the arrays change.
    """

    arrays: list[mx.array]

    def select_rows(self, prompts: mx.array, columns: mx.array) -> None:
        """Keeps some `prompts` [B'], and of their completions some `columns` [B', n']."""


class Layer(Protocol):
    """One layer of the trunk.

    `module` is mlx-vlm's; `rotary` is the index of the family's angles that the layer takes, and
    `visibility` chooses its masks.
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
        """Prompt rows [B * P, D] after the layer, and what completions need of them.

        After the `last` layer nobody reads a prompt's rows, so they are not computed there. `mask`
        is `Prefixes.mask` of the layer's visibility.
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
        """Completion rows [B * n * T, D] after the layer; `shape` is (B, n, T).

        `prefix` is what the method `prefix` returned. In a decode `step` T is 1, and `cache`, which
        `begin` made, holds earlier tokens; otherwise both are None.
        """

    def begin(self, prefix: KeysValues, n: int) -> CompletionCache:
        """The cache of n completions of each prompt, before their first tokens."""

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """What several calls of `prefix` returned, as if one call had."""


def checkpoint_if(
    recompute: bool, module: Any, function: Callable[_Inputs, _Output]
) -> Callable[_Inputs, _Output]:
    """`function`, which computes with `module`'s parameters.

    If `recompute`, its backward recomputes the activations instead of keeping them.
    """
    if not recompute:
        return function
    checkpointed: Callable[_Inputs, _Output] = checkpoint(module, function)
    return checkpointed
