"""Which completions a backend computes, and whose statistics the results are: small cases written
out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from opd.groups import drop_empty, records, restore_empty, slices
from opd.types import (
    STATISTICS,
    Alternatives,
    Completion,
    Group,
    Prompt,
    TokenStatistics,
    VisualTokens,
)

NONE = VisualTokens(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 4), np.float32))
PROMPT = Prompt(np.arange(2, dtype=np.int32), np.arange(2, dtype=np.int32)[None], {}, "", NONE)


def group(*lengths):
    completions = tuple(
        Completion(np.full(length, length, np.int32), np.zeros(length, np.float32), True)
        for length in lengths
    )
    return Group(
        PROMPT,
        PROMPT,
        completions,
        tuple(np.full(length, 0.1 * length, np.float32) for length in lengths),
    )


def lengths(groups):
    for one in groups:
        assert [len(completion) for completion in one.completions] == [
            len(weights) for weights in one.weights
        ]
    return [[len(completion) for completion in one.completions] for one in groups]


def test_statistics_are_the_six_arrays():
    assert STATISTICS == (
        "student_logprobs",
        "teacher_logprobs",
        "student_entropy",
        "teacher_entropy",
        "ratio",
        "divergence",
    )


def test_completions_without_tokens_are_dropped_and_restored():
    groups = [group(2, 0, 1), group(0, 0), group(), group(3)]
    assert lengths(drop_empty(groups)) == [[2, 1], [3]]
    rows = np.arange(36, dtype=np.float32).reshape(6, 6)
    restored = restore_empty(groups, records(drop_empty(groups), rows))
    assert [[len(one.ratio) for one in row] for row in restored] == [[2, 0, 1], [0, 0], [], [3]]
    np.testing.assert_array_equal(restored[0][2].student_logprobs, [12])
    np.testing.assert_array_equal(restored[3][0].divergence, [23, 29, 35])
    assert restored[1][0].divergence.dtype == np.float32


def test_nothing_but_empty_completions():
    assert drop_empty([group(0), group()]) == []
    assert [[len(one.ratio) for one in row] for row in restore_empty([group(0), group()], [])] == [
        [0],
        [],
    ]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, [[[1, 2, 3], [4]]]),
        (1, [[[1], [4]], [[2], []], [[3], []]]),
        (2, [[[1, 2], [4]], [[3], []]]),
        (5, [[[1, 2, 3], [4]]]),
    ],
)
def test_slices_hold_every_group(size, expected):
    assert [lengths(part) for part in slices([group(1, 2, 3), group(4)], size)] == expected


def test_records_are_cut_in_order():
    rows = np.arange(24, dtype=np.float32).reshape(4, 6)
    top = Alternatives(
        np.arange(8, dtype=np.int32).reshape(4, 2), -np.arange(8, dtype=np.float32).reshape(4, 2)
    )
    (first, second), (third,) = records([group(1, 2), group(1)], rows, student_top=top)
    assert isinstance(first, TokenStatistics)
    np.testing.assert_array_equal(second.teacher_logprobs, [7, 13])
    np.testing.assert_array_equal(third.divergence, [23])
    np.testing.assert_array_equal(second.student_top.tokens, [[2, 3], [4, 5]])
    np.testing.assert_array_equal(third.student_top.logprobs, [[-6, -7]])
    assert third.teacher_top is None
    assert all(getattr(second, name).flags.c_contiguous for name in STATISTICS)
