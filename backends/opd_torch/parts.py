"""Groups in parts, and what was found of their completions back in its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, compress
from typing import Any

import numpy as np
import torch

from opd.types import Alternatives, Group, TokenStatistics
from opd_torch.batch import Targets
from opd_torch.objective import STATISTICS, HeadResult


def without_empty(groups: Sequence[Group]) -> list[Group]:
    """The groups without empty completions, and without those that have no other."""
    return [_members(group, [len(completion) > 0 for completion in group.completions]) for group in groups if group.tokens]


def cut(groups: Sequence[Group], split: int) -> list[list[Group]]:
    """The groups with at most `split` completions each at a time, or all where it is 0; each group in every part."""
    most = max(len(group.completions) for group in groups)
    starts = range(0, most, split or most)
    return [
        [_members(group, [start <= member < start + (split or most) for member in range(len(group.completions))]) for group in groups]
        for start in starts
    ]


def _members(group: Group, chosen: Sequence[bool]) -> Group:
    return replace(group, completions=tuple(compress(group.completions, chosen)), weights=tuple(compress(group.weights, chosen)))


def in_place(groups: Sequence[Group], statistics: Sequence[Sequence[TokenStatistics]]) -> list[list[TokenStatistics]]:
    """Statistics of what `without_empty` left, in the places of all completions; empty ones have none."""
    found, empty = chain.from_iterable(statistics), np.zeros(0, np.float32)
    nothing = TokenStatistics(empty, empty, empty, empty, empty, empty)
    return [[next(found) if len(completion) else nothing for completion in group.completions] for group in groups]


def records(result: HeadResult, targets: Targets) -> list[list[TokenStatistics]]:
    """The result's rows as one record a completion."""
    values = targets.ragged(torch.stack([getattr(result, name) for name in STATISTICS], 1).float())
    tops = [
        None if top is None else (targets.ragged(top[0].int()), targets.ragged(top[1].float()))
        for top in (result.student_top, result.teacher_top)
    ]

    def record(group: int, member: int) -> TokenStatistics:
        alternatives = [None if top is None else Alternatives(top[0][group][member], top[1][group][member]) for top in tops]
        columns: dict[str, Any] = dict(zip(STATISTICS, np.ascontiguousarray(values[group][member].T), strict=True))
        return TokenStatistics(**columns, student_top=alternatives[0], teacher_top=alternatives[1])

    return [[record(group, member) for member in range(count)] for group, count in enumerate(targets.counts)]
