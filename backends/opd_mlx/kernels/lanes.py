"""Streams among which a call's prompts are divided: MLX runs a CPU stream on one core, so there is one for each of them; a GPU has one.

A share is some of a call's prompts, from pixels to gradient on one stream.
"""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeVar

import mlx.core as mx

from opd.types import Prompt

Share = TypeVar("Share")
Result = TypeVar("Result")

if mx.default_device() == mx.cpu:
    # MLX walks a graph breadth first as long as that is at most so wide, 20 if nobody says; then depth first, which is one share after
    # the other. It asks for this once, before it first evaluates anything.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "64")


class _Lanes(threading.local):
    """A stream belongs to the thread that made it."""

    def __init__(self) -> None:
        more = min(os.cpu_count() or 1, 8) - 1 if mx.default_device() == mx.cpu else 0
        self.streams = [mx.default_stream(mx.default_device()), *(mx.new_stream(mx.cpu) for _ in range(more))]
        self._taken = False

    @property
    def free(self) -> list[mx.Stream]:
        """Streams among which the images of one share are divided: all, while the call is not divided itself."""
        return [mx.default_stream(mx.default_device())] if self._taken else self.streams

    def shares(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Indices of `prompts`, cut into at most as many shares as there are streams, of about as many tokens each.

        Prompts of one key stay together, since their images are computed once.
        """
        members: dict[str, list[int]] = defaultdict(list)
        for index, prompt in enumerate(prompts):
            members[prompt.key].append(index)
        shares: list[list[int]] = [[] for _ in self.streams]
        tokens = [0] * len(shares)
        for indices in members.values():
            least = tokens.index(min(tokens))
            shares[least] += indices
            tokens[least] += sum(len(prompts[index]) for index in indices)
        return [share for share in shares if share]

    def each(self, shares: Sequence[Share], run: Callable[[Share], Result]) -> list[Result]:
        """`run` of every share, which builds a graph without evaluating it, each on its stream."""
        if len(shares) == 1:
            return [run(shares[0])]
        results: list[Result] = []
        self._taken = True
        try:
            for stream, share in zip(self.streams, shares, strict=False):
                with mx.stream(stream):
                    results.append(run(share))
        finally:
            self._taken = False
        return results


LANES = _Lanes()
