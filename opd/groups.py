"""Bookkeeping of groups for backends: drops empty completions, cuts groups into slices, and assigns
statistics to completions.

Legend: n completions of a group, T tokens of a completion, M tokens of all completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, compress

import numpy as np

from opd.types import Alternatives, Completion, FloatArray, Group, IntArray, TokenStatistics


def nothing_sampled(uniforms: FloatArray) -> list[list[Completion]]:
    """Empty completions, for `uniforms` [B, n, max_tokens] of which one size is 0."""
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    return [[empty for _ in row] for row in uniforms]


def drop_empty(groups: Sequence[Group]) -> list[Group]:
    """The groups without completions of zero tokens; a group left without completions is dropped
    too."""
    return [
        _only(group, [len(completion) > 0 for completion in group.completions])
        for group in groups
        if group.tokens
    ]


def slices(groups: Sequence[Group], completions: int) -> list[list[Group]]:
    """Cuts all groups into slices of at most `completions` completions of each group; 0 makes one
    slice.

    Every slice holds every group; the last slices hold groups with few completions as empty groups.
    """
    most = max(len(group.completions) for group in groups)
    size = completions or most
    return [
        [_members(group, start, start + size) for group in groups] for start in range(0, most, size)
    ]


def rows_to_attend(completions: Sequence[Sequence[Completion]]) -> list[list[IntArray]]:
    """The tokens whose rows `Backend.attend` shows: those of all completions, and for a prompt
    without completions one token, which the prompt's last row would predict; the row does not
    depend on it. Raises ValueError for an empty completion."""
    if any(len(completion) == 0 for completion in chain.from_iterable(completions)):
        raise ValueError("an empty completion has no rows that attend to anything")
    last_row = np.zeros(1, np.int32)
    return [[completion.tokens for completion in members] or [last_row] for members in completions]


def restore_empty(
    groups: Sequence[Group], statistics: Sequence[Sequence[TokenStatistics]]
) -> list[list[TokenStatistics]]:
    """One record for every completion of `groups`, from the `statistics` of `drop_empty(groups)`.

    Completions without tokens get records of empty arrays.
    """
    computed, nothing = chain.from_iterable(statistics), np.zeros(0, np.float32)
    empty = TokenStatistics(nothing, nothing, nothing, nothing, nothing, nothing)
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

    Rows are in order of group, completion and token. `student_top` and `teacher_top`, whose arrays
    are [M, top], are cut in the same way.
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


def _members(group: Group, start: int, stop: int) -> Group:
    """The group with completions `start` to `stop` - 1 alone."""
    return replace(
        group, completions=group.completions[start:stop], weights=group.weights[start:stop]
    )


def _only(group: Group, chosen: Sequence[bool]) -> Group:
    """The group with those completions alone for which `chosen` [n] is true."""
    return replace(
        group,
        completions=tuple(compress(group.completions, chosen)),
        weights=tuple(compress(group.weights, chosen)),
    )
