"""Builds summary.json, the result of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opd.measure import gap
from opd.measure.gap import Answered
from opd.method.step import GRADIENT, OUTPUTS


def summary(
    facts: Mapping[str, Any],
    steps: Sequence[Mapping[str, Any]],
    before: Sequence[Answered],
    after: Sequence[Answered],
    held_out: int,
) -> dict[str, Any]:
    """The content of summary.json: `facts`, counts over `steps` (rows of metrics.jsonl), and the
    accuracies before and after, on the examples that were answered both times. `held_out`: number
    of examples that were to be measured."""
    before, after = gap.paired(before, after)
    result = {
        **facts,
        "examples": len(after),
        "steps_not_finite": sum(row.get("not_taken") in (GRADIENT, OUTPUTS) for row in steps),
        "steps_not_taken": sum(not row["taken"] for row in steps),
        "completions": sum(row["completions"] for row in steps),
        "completions_dropped": sum(row["dropped"] for row in steps),
        "completions_truncated": sum(row["truncated"] for row in steps),
        "prompts_skipped": sum(row["skipped"] for row in steps),
        "rows_not_measured": held_out - len(after),
        "verdict": None,
    }
    if after:
        result |= {"before": gap.accuracies(before), "after": gap.accuracies(after)}
        result |= {**gap.gap_closed(before, after), **gap.changes(before, after)}
    return result
