"""What a layer of the trunk must do, in the two streams of prompts and completions.

Legend: B prompts, P prompt tokens, n completions of each, T completion tokens (1 in decoding), H heads in G groups over H / G
key-value heads, E head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import mlx.core as mx

from opd_mlx.batch import Masks, Prefixes, Rule, Step

KeysValues: TypeAlias = tuple[mx.array, mx.array]
"""Keys, with positions rotated in, and values: [B, H / G, P, E] of prompts, [B, H / G, n, T, E] of completions.

In a recurrent layer, which keeps no keys: whatever two arrays its completions start from.
"""


class Own(Protocol):
    """What a layer has kept of the tokens decoded so far: two `arrays`, whose list stays the same while they change."""

    arrays: list[mx.array]

    def keep(self, prompts: mx.array, columns: mx.array) -> None:
        """Leaves out all but some `prompts` [B'], and of their completions all but `columns` [B', n']."""


class Layer(Protocol):
    """One layer of the trunk, as the two streams run it.

    `module` is mlx-vlm's; `rotary` says which of the family's angles it takes, and `rule` which of the masks.
    """

    module: Any
    rotary: int
    rule: Rule

    def prefix(
        self, hidden: mx.array, angles: KeysValues, prefixes: Prefixes, mask: mx.array | None, last: bool
    ) -> tuple[mx.array, KeysValues]:
        """Prompt rows [B * P, D] through the layer: the rows after it, and what completions need of them.

        After the `last` layer nobody reads a prompt's rows, so they are not computed there. `mask` is `Prefixes.mask` of its rule.
        """

    def completion(
        self,
        hidden: mx.array,
        angles: KeysValues,
        shape: tuple[int, int, int],
        prefix: KeysValues,
        masks: Masks,
        own: Any,
        step: Step | None,
    ) -> mx.array:
        """Completion rows [B * n * T, D] through the layer. `shape` is (B, n, T); `prefix` is what `prefix` gave.

        In a token `step` T is 1, and earlier tokens are in `own`, which `begin` made; else both are None.
        """

    def begin(self, prefix: KeysValues, n: int) -> Own:
        """For decoding: what n completions of each prompt start with."""

    def join(self, prefixes: Sequence[KeysValues]) -> KeysValues:
        """What several calls of `prefix` gave, as if it had been one."""
