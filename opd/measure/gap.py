"""The regional-to-global gap: accuracy on the crop minus accuracy on the full image, before and
after training.

The student answers greedily, once on the full image and once on the evidence crop. Only this module
reads the reference answers of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from opd.backend import Backend
from opd.data.answers import matches
from opd.measure.intervals import ratio, share_of, with_interval
from opd.method.rollout import sample
from opd.options import Options
from opd.paths import PathText
from opd.prefetch import prefetch
from opd.progress import Quiet
from opd.types import Encoder, Example, Prompt, Sampling
from opd.views.usable import Skipped, Unusable, encode
from opd.views.view import ViewOptions

SLICE = 64
"""Largest number of examples in a slice, which is encoded and answered at once."""

SLICE_BYTES = 2**28
"""Largest number of bytes in the image arrays of a slice, unless one example alone has more. Two
slices are in memory: the next is encoded while one is answered."""

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

    `full_right` and `crop_right` are None if the example has no reference `answer`. `row`: the
    index among the measured examples.
    """

    id: str
    answer: str | Sequence[str] | None
    full: str
    crop: str
    full_right: bool | None
    crop_right: bool | None
    row: int = -1


@dataclass(frozen=True)
class Slice:
    """Examples that are answered together: their indices `rows`, and (full image, crop) `prompts`
    of each. `passed` counts all examples up to here, usable or not."""

    rows: tuple[int, ...]
    prompts: tuple[tuple[Prompt, Prompt], ...]
    passed: int


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
    """Greedy answers to every example, on the full image and on the crop.

    `max_tokens`: longest answer. `budget`: padded tokens that are sampled at once. `progress` is
    called with the number of prompts that are newly done. `limit`: longest prompt in tokens. An
    example that training could not use is left out and added to `skipped`. `slice_size`,
    `slice_bytes`: most examples and bytes of image arrays that are encoded together.
    """
    skipped = skipped or Skipped(Quiet())
    slices = _slices(encoder, examples, view, limit, skipped, slice_size, slice_bytes)
    answered: list[Answered] = []
    passed = 0
    for part in prefetch(lambda number: next(slices, None), count()):
        if part is None:
            break
        full = [full for full, _ in part.prompts]
        crop = [crop for _, crop in part.prompts]
        if full:
            # Both at once, since a token step takes little longer for twice the rows.
            texts = _greedy(backend, encoder, [*full, *crop], max_tokens, budget, progress)
            for place, row in enumerate(part.rows):
                answered.append(judge(row, examples[row], texts[place], texts[len(full) + place]))
        progress(2 * (part.passed - passed - len(full)))
        passed = part.passed
    return answered


def _slices(
    encoder: Encoder,
    examples: Sequence[Example],
    view: ViewOptions,
    limit: int | None,
    skipped: Skipped,
    most_examples: int,
    most_bytes: int,
) -> Iterator[Slice]:
    """Yields the usable examples with their prompts, in slices of at most `most_examples` and
    `most_bytes`, unless one example alone has more."""
    # A control run trains on another view, but is measured on the crop.
    crop = view.model_copy(update={"kind": "crop"})
    rows: list[int] = []
    prompts: list[tuple[Prompt, Prompt]] = []
    slice_bytes = 0
    for row in range(len(examples)):
        try:
            both = encode(encoder, examples[row], crop, limit)
        except Unusable as error:
            skipped.add(examples[row], error)
            continue
        size = sum(map(_bytes, both))
        if rows and (len(rows) == most_examples or slice_bytes + size > most_bytes):
            yield Slice(tuple(rows), tuple(prompts), row)
            rows, prompts, slice_bytes = [], [], 0
        rows.append(row)
        prompts.append(both)
        slice_bytes += size
    yield Slice(tuple(rows), tuple(prompts), len(examples))


def _bytes(prompt: Prompt) -> int:
    """Bytes of a prompt's image arrays; the other arrays are shared between prompts, and small."""
    return sum(array.nbytes for array in prompt.images.values())


def accuracies(answered: Sequence[Answered]) -> dict[str, Any]:
    """Measured numbers by name: the share of rows on which full image and crop agree, and, over the
    rows with a reference answer, both accuracies and the gap, all in 0..1 with 95 % intervals."""
    same = np.array([matches(row.full, row.crop) for row in answered], dtype=np.float64)
    full, crop = correct(answered)
    result: dict[str, Any] = {
        "rows": len(answered),
        "rows_with_answer": len(full),
        **share_of("agreement", same),
    }
    if len(full):
        result |= share_of("full_accuracy", full)
        result |= share_of("crop_accuracy", crop)
        result |= with_interval("gap", [full, crop], lambda full, crop: crop - full)
    return result


def gap_closed(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Any]:
    """(full after - full before) / (crop before - full before), a fraction, with the interval.

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
    `paired`.

    `full_change` and `crop_change` are accuracy after minus accuracy before, with paired intervals.
    A change is significant if the interval excludes 0. The verdict is "collapsed" if an accuracy
    fell significantly, to less than COLLAPSED of the accuracy before; else "worse" if an accuracy
    fell significantly; else "improved" if the full image's rose significantly; else "unchanged". It
    is None if no example has a reference answer.
    """
    full_before, crop_before = correct(before)
    full_after, crop_after = correct(after)
    if not len(full_before):
        return {"verdict": None}
    result: dict[str, Any] = {}
    fell, collapsed = False, False
    for name, first, second in (
        ("full_change", full_before, full_after),
        ("crop_change", crop_before, crop_after),
    ):
        result |= with_interval(name, [first, second], lambda first, second: second - first)
        if result[f"{name}_interval"][1] < 0:
            fell = True
            collapsed = collapsed or bool(second.sum() < COLLAPSED * first.sum())
    improved = result["full_change_interval"][0] > 0
    verdict = (
        "collapsed" if collapsed else "worse" if fell else "improved" if improved else "unchanged"
    )
    return {"verdict": verdict, **result}


def _greedy(
    backend: Backend,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None],
) -> list[str]:
    """The greedy completion of each prompt, as text."""
    unused = np.zeros((len(prompts), 1, max_tokens), np.float32)  # greedy decoding draws nothing
    sampling = Sampling(0.0, encoder.stop, encoder.banned)
    return [
        encoder.decode(group[0].tokens.tolist())
        for group in sample(backend, prompts, unused, sampling, budget, progress)
    ]


def judge(row: int, example: Example, full: str, crop: str) -> Answered:
    """The record of the answers `full` (on the full image) and `crop` to the example at index
    `row`, each judged against the reference answer if there is one."""
    if example.answer is None:
        return Answered(example.id, None, full, crop, None, None, row)
    full_right = matches(full, example.answer, example.choices)
    crop_right = matches(crop, example.answer, example.choices)
    return Answered(example.id, example.answer, full, crop, full_right, crop_right, row)


def correct(answered: Sequence[Answered]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two arrays [rows with a reference answer]: 1 for a correct answer and 0 for a wrong one, on
    the full image and on the crop."""
    judged = [row for row in answered if row.answer is not None]
    full = np.array([row.full_right for row in judged], np.float64)
    crop = np.array([row.crop_right for row in judged], np.float64)
    return full, crop
