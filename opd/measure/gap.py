"""The regional-to-global gap: accuracy on the crop minus accuracy on the full image, before and
after training.

The student answers greedily, once on the full image and once on the evidence crop, if there is one.
Only this module
reads the reference answers of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from opd.backend import Backend
from opd.data.answers import matches
from opd.measure.intervals import ratio, share_of, with_interval
from opd.measure.replies import SLICE, SLICE_BYTES, Prompts, replies
from opd.options import Options
from opd.paths import PathText
from opd.progress import Quiet
from opd.types import Encoder, Example
from opd.views.crop import has_evidence
from opd.views.usable import Skipped, encode, encode_full
from opd.views.view import ViewOptions

NAMES = ("full", "crop")

COLLAPSED = 0.5
"""A run has collapsed if accuracy fell significantly, to less than this share of the accuracy
before."""


class MeasureOptions(Options):
    """The examples whose accuracy is measured before and after training."""

    path: PathText = Field(
        "",
        description=(
            "Data that is measured; empty: fresh scenes where data.path is tiny, else rows spread"
            " over the training data."
        ),
    )
    count: int = Field(200, ge=0, description="Rows that are measured before and after; 0: none.")
    max_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")
    every: int = Field(
        0,
        ge=0,
        description=(
            "Steps between measurements while training, into accuracy.jsonl; 0: before and after"
            " only."
        ),
    )


@dataclass(frozen=True)
class Answered:
    """The model's answers to one example, on the full image and on the crop.

    `crop` is None if the example has neither boxes nor teacher images. `full_right` and
    `crop_right` are None if the example has no reference `answer`, or there is no answer to judge.
    `row`: the index among the measured examples.
    """

    id: str
    answer: str | Sequence[str] | None
    full: str
    crop: str | None
    full_right: bool | None
    crop_right: bool | None
    row: int = -1


def greedy_answers(
    backend: Backend,
    encoder: Encoder,
    examples: Sequence[Example],
    view: ViewOptions,
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None] = lambda prompts: None,
    limit: int | None = None,
    skipped: Skipped | None = None,
    slice_size: int = SLICE,
    slice_bytes: int = SLICE_BYTES,
) -> list[Answered]:
    """Greedy answers to every example, on the full image and on the crop; on the full image alone
    for an example without boxes and teacher images.

    `max_tokens`: longest answer. `budget`: padded tokens that are sampled at once. `progress` is
    called with the number of prompts that are newly done, of two for each example. `limit`: longest
    prompt in tokens. An example that cannot be used is left out and added to `skipped`.
    `slice_size`, `slice_bytes`: most examples and bytes of image arrays that are encoded together.
    """
    # A control run trains on another view, but is measured on the crop.
    crop = view.of("crop")

    def prompts_of(example: Example) -> Prompts:
        if not has_evidence(example):
            return {"full": encode_full(encoder, example, limit)}
        return dict(zip(NAMES, encode(encoder, example, crop, limit), strict=True))

    return [
        judge(row, examples[row], said["full"].text, said["crop"].text if "crop" in said else None)
        for row, said in replies(
            backend,
            encoder,
            examples,
            NAMES,
            prompts_of,
            max_tokens,
            budget,
            progress,
            skipped or Skipped(Quiet()),
            slice_size,
            slice_bytes,
        )
    ]


def accuracies(answered: Sequence[Answered]) -> dict[str, Any]:
    """Measured numbers by name: the share of rows on which full image and crop agree, and, over the
    rows with a reference answer, both accuracies and the gap, all in 0..1 with 95 % intervals.

    Rows without a crop count for the full image's accuracy alone; if there are any, `crop_rows` is
    the number of the others. What no row has is left out.
    """
    seen = [row for row in answered if row.crop is not None]
    judged = [row for row in answered if row.answer is not None]
    full, crop = correct(answered)
    result: dict[str, Any] = {"rows": len(answered), "rows_with_answer": len(judged)}
    if len(seen) < len(answered):
        result["crop_rows"] = len(seen)
    if seen:
        same = np.array([matches(row.full, str(row.crop)) for row in seen], np.float64)
        result |= share_of("agreement", same)
    if judged:
        result |= share_of("full_accuracy", _full_right(judged))
    if len(full):
        result |= share_of("crop_accuracy", crop)
        result |= with_interval("gap", [full, crop], lambda full, crop: crop - full)
    return result


def gap_closed(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Any]:
    """(full after - full before) / (crop before - full before), a fraction, with the interval, over
    the rows with a crop.

    Empty if the gap before is not significantly above 0, since a quotient by it would mean nothing.
    The crop's accuracy is that before training, so that losing crop accuracy never closes the gap.
    """
    full_before, crop_before = correct(before)
    full_after, _ = correct(after)
    if not len(full_before) or accuracies(before)["gap_interval"][0] <= 0:
        return {}
    columns = [full_before, crop_before, full_after]
    return with_interval(
        "gap_closed", columns, lambda before, crop, after: ratio(after - before, crop - before)
    )


def paired(
    before: Sequence[Answered], after: Sequence[Answered]
) -> tuple[list[Answered], list[Answered]]:
    """`before` and `after` without the examples that were answered only once, both in order of
    rows, so that they can be compared."""
    rows = {answer.row for answer in before} & {answer.row for answer in after}

    def common(answered: Sequence[Answered]) -> list[Answered]:
        return sorted(
            (answer for answer in answered if answer.row in rows), key=lambda answer: answer.row
        )

    return common(before), common(after)


def changes(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Any]:
    """The change of both accuracies by training, and a `verdict`; `before` and `after` are
    `paired`. Where no row has a crop, the full image's accuracy alone counts.

    `full_change` and `crop_change` are accuracy after minus accuracy before, with paired intervals.
    A change is significant if the interval excludes 0. The verdict is "collapsed" if an accuracy
    fell significantly, to less than COLLAPSED of the accuracy before; else "worse" if an accuracy
    fell significantly; else "improved" if the full image's rose significantly; else "unchanged". It
    is None if no example has a reference answer.
    """
    full = [_full_right(answered) for answered in (before, after)]
    crop = [correct(answered)[1] for answered in (before, after)]
    if not len(full[0]):
        return {"verdict": None}
    result: dict[str, Any] = {}
    fell, collapsed = False, False
    for name, (first, second) in (("full_change", full), ("crop_change", crop)):
        if not len(first):
            continue
        result |= with_interval(name, [first, second], lambda first, second: second - first)
        if result[f"{name}_interval"][1] < 0:
            fell = True
            collapsed = collapsed or bool(second.sum() < COLLAPSED * first.sum())
    improved = result["full_change_interval"][0] > 0
    verdict = (
        "collapsed" if collapsed else "worse" if fell else "improved" if improved else "unchanged"
    )
    return {"verdict": verdict, **result}


def judge(row: int, example: Example, full: str, crop: str | None) -> Answered:
    """The record of the answers `full` (on the full image) and `crop` (None: the example has no
    crop) to the example at index `row`, each judged against the reference answer if there is
    one."""
    if example.answer is None:
        return Answered(example.id, None, full, crop, None, None, row)
    full_right = matches(full, example.answer, example.choices)
    crop_right = None if crop is None else matches(crop, example.answer, example.choices)
    return Answered(example.id, example.answer, full, crop, full_right, crop_right, row)


def correct(answered: Sequence[Answered]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two arrays [rows with a reference answer and a crop]: 1 for a correct answer and 0 for a
    wrong one, on the full image and on the crop."""
    judged = [row for row in answered if row.answer is not None and row.crop is not None]
    return _full_right(judged), np.array([row.crop_right for row in judged], np.float64)


def _full_right(answered: Sequence[Answered]) -> NDArray[np.float64]:
    """An array [rows with a reference answer]: 1 for a correct answer on the full image, 0 for a
    wrong one."""
    return np.array([row.full_right for row in answered if row.answer is not None], np.float64)
