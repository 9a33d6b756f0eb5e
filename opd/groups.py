"""Bookkeeping of groups for backends: which completions are computed, in which slices, and whose
statistics the results are.

Legend: n completions of a group, T tokens of a completion, M tokens of all completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, compress

import numpy as np

from opd.types import Alternatives, FloatArray, Group, TokenStatistics


def drop_empty(groups: Sequence[Group]) -> list[Group]:
    """The groups with only those completions that have tokens; groups without any such are left
    out."""
    return [
        _only(group, [len(completion) > 0 for completion in group.completions])
        for group in groups
        if group.tokens
    ]


def slices(groups: Sequence[Group], completions: int) -> list[list[Group]]:
    """Cuts all groups into slices of at most `completions` completions of each; 0 makes one slice.

    Every slice holds every group, though a group with few completions may have none in the last
    slices.
    """
    most = max(len(group.completions) for group in groups)
    size = completions or most
    return [
        [
            _only(
                group, [start <= member < start + size for member in range(len(group.completions))]
            )
            for group in groups
        ]
        for start in range(0, most, size)
    ]


def restore_empty(
    groups: Sequence[Group], statistics: Sequence[Sequence[TokenStatistics]]
) -> list[list[TokenStatistics]]:
    """One record for every completion of `groups`, from the `statistics` of `drop_empty(groups)`.

    Completions without tokens get records of empty arrays.
    """
    computed, none = chain.from_iterable(statistics), np.zeros(0, np.float32)
    empty = TokenStatistics(none, none, none, none, none, none)
    return [
        [next(computed) if len(completion) else empty for completion in group.completions]
        for group in groups
    ]


def records(
    groups: Sequence[Group],
    statistics: FloatArray,
    student_top: Alternatives | None = None,
    teacher_top: Alternatives | None = None,
) -> list[list[TokenStatistics]]:
    """Cuts `statistics` [M, 6], columns as in `STATISTICS`, into one record for every completion.

    Rows are in order of group, completion and token. The alternatives of either policy, [M, top],
    are cut alike.
    """
    start = 0
    cut: list[list[TokenStatistics]] = []
    for group in groups:
        cut.append([])
        for completion in group.completions:
            rows = slice(start, start + len(completion))
            start = rows.stop
            tops = [
                None if top is None else Alternatives(top.tokens[rows], top.logprobs[rows])
                for top in (student_top, teacher_top)
            ]
            cut[-1].append(TokenStatistics(*np.ascontiguousarray(statistics[rows].T), *tops))
    return cut


def _only(group: Group, chosen: Sequence[bool]) -> Group:
    return replace(
        group,
        completions=tuple(compress(group.completions, chosen)),
        weights=tuple(compress(group.weights, chosen)),
    )
