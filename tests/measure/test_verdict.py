"""A run's verdict is about accuracy, and a fall is told first, in words."""

from __future__ import annotations

from pathlib import Path

import pytest

from opd.measure.gap import accuracies, changes, gap_closed, paired
from opd_cli.tables import before_after
from tests.measure.test_gap import answered


def told(capsys, before, after):
    """The verdict on two measurements of 100 rows each, given as rights on the full image and on
    the crop, and the lines of the table."""
    views = [
        answered(*("r" * right + "w" * (100 - right) for right in one)) for one in (before, after)
    ]
    found = changes(*views)
    summary = {
        "before": accuracies(views[0]),
        "after": accuracies(views[1]),
        **gap_closed(*views),
        **found,
    }
    rest = {
        "steps": 3,
        "seconds": 1,
        "device": "toy",
        "rows_not_measured": 0,
        "completions": 4,
        "completions_truncated": 0,
    }
    before_after({**summary, **rest}, Path("run"))
    return found["verdict"], capsys.readouterr().out.splitlines()


@pytest.mark.parametrize(
    ("before", "after", "verdict", "first"),
    [
        (
            (59, 100),
            (4, 6),
            "collapsed",
            (
                "the model collapsed: accuracy fell on the full image from 59.0 to 4.0 % and on the"
                " evidence"
            ),
        ),
        (
            (59, 100),
            (70, 40),
            "collapsed",
            (
                "the model collapsed: accuracy fell on the evidence crop from 100.0 to 40.0 %, and"
                " rose on"
            ),
        ),
        (
            (30, 90),
            (14, 90),
            "collapsed",
            "the model collapsed: accuracy fell on the full image from 30.0 to 14.0 %",
        ),
        (
            (59, 100),
            (50, 100),
            "worse",
            "the model got worse: accuracy fell on the full image from 59.0 to 50.0 %",
        ),
        (
            (59, 100),
            (59, 90),
            "worse",
            "the model got worse: accuracy fell on the evidence crop from 100.0 to 90.0 %",
        ),
        (
            (59, 100),
            (90, 92),
            "worse",
            (
                "accuracy fell on the evidence crop from 100.0 to 92.0 %, and rose on the full"
                " image from 59.0 to 90.0"
            ),
        ),
        ((59, 100), (90, 100), "improved", "100 examples"),
        ((59, 99), (90, 98), "improved", "100 examples"),
        ((59, 100), (59, 100), "unchanged", "100 examples"),
        ((59, 98), (60, 97), "unchanged", "100 examples"),
        ((0, 0), (0, 0), "unchanged", "100 examples"),
    ],
)
def test_a_fall_is_told_before_the_table(capsys, before, after, verdict, first):
    found, lines = told(capsys, before, after)
    assert found == verdict
    assert lines[0].startswith(first)
    (gap,) = (
        line for line in lines if line.strip().startswith("gap ") and "gap closed" not in line
    )
    rose = after[0] > before[0] + 1
    assert gap.rstrip().endswith(" -") is (verdict in ("worse", "collapsed") and not rose)


def test_without_answers_there_is_no_verdict():
    assert changes(answered("--", "--"), answered("--", "--")) == {"verdict": None}


def test_changes_are_paired():
    """Ten rows lost and ten won are no change; what is compared is the same rows."""
    before, after = (
        answered("r" * 10 + "w" * 90, "r" * 100),
        answered("w" * 10 + "r" * 10 + "w" * 80, "r" * 100),
    )
    found = changes(before, after)
    assert (found["verdict"], found["full_change"]) == ("unchanged", 0)
    low, high = found["full_change_interval"]
    assert low < 0 < high
    first, second = paired(before[5:], after[:50])
    assert [one.row for one in first] == [one.row for one in second] == list(range(5, 50))
