"""Groups in parts, and what was found of their completions as records."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import mlx.core as mx
import numpy as np

from opd.types import Alternatives, Group, TokenStatistics
from opd_mlx.batch import Batch, Targets
from opd_mlx.objective import HeadResult


@dataclass(frozen=True)
class Part:
    """Some of the completions of all groups of a call, by share: the groups, and their rows for either policy."""

    groups: list[list[Group]]
    student: list[Batch]
    teacher: list[Batch]

    @property
    def filled(self) -> list[int]:
        """The shares of which some completion has tokens."""
        return [number for number, share in enumerate(self.groups) if any(group.tokens for group in share)]


def cut(shares: list[list[Group]], split: int) -> Iterator[list[list[Group]]]:
    """The groups of all shares with `split` of their completions at a time; 0: with all."""
    most = max(len(group.completions) for group in chain(*shares))
    for start in range(0, most, split or most):
        some = slice(start, start + (split or most))
        yield [[replace(group, completions=group.completions[some], weights=group.weights[some]) for group in share] for share in shares]


def nothing(groups: Sequence[Group]) -> list[list[TokenStatistics]]:
    """Empty statistics of all completions."""
    empty = np.zeros(0, np.float32)
    return [[TokenStatistics(empty, empty, empty, empty, empty, empty) for _ in group.completions] for group in groups]


def records(result: HeadResult, targets: Targets) -> list[list[TokenStatistics]]:
    """The result's rows as one record a completion."""
    names = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy", "ratio", "divergence")
    rows: Any = targets.ragged(mx.stack([getattr(result, name) for name in names], axis=1))
    pairs = (
        (result.student_top_tokens, result.student_top_logprobs),
        (result.teacher_top_tokens, result.teacher_top_logprobs),
    )
    tops = [[targets.ragged(part) for part in pair if part is not None] for pair in pairs if pair[0] is not None]
    return [
        [
            TokenStatistics(*np.ascontiguousarray(values.T), *(Alternatives(*(part[group][member] for part in top)) for top in tops))
            for member, values in enumerate(members)
        ]
        for group, members in enumerate(rows)
    ]
