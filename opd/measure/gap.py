"""The regional-to-global gap: accuracy on the crop less accuracy on the full image, before and
after training.

Answers are read here and nowhere else. The student answers greedily, once on the full image and
once on the evidence crop.
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
from opd.views.crop import ViewOptions
from opd.views.usable import Skipped, Unusable, encode

SLICE = 64
"""Examples that are encoded at a time, at most."""

SLICE_BYTES = 2**28
"""Bytes of prompts that are encoded at a time: the pixels of thousands of large images would fill
the memory. One example may be above, and the next slice is encoded while one is answered."""

COLLAPSED = 0.5
"""A run collapsed where accuracy fell for certain, to less than this share of the accuracy
before."""


class MeasureOptions(Options):
    """What the table before and after training is measured on."""

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
    """What the model said of one example; `full_right` and `crop_right` are None where the example
    has no answer.

    `row` is the index among the examples that are measured.
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
    """Examples that are answered together, with their indices and both prompts; `passed` of the
    examples so far, usable or not."""

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
) -> list[Answered]:
    """Greedy answers to every example on its full image and on its crop; `budget` in padded tokens,
    `progress` in prompts.

    An example that training could not use, of more than `limit` tokens for one, is left out and
    handed to `skipped`.
    """
    skipped = skipped or Skipped(Quiet())
    slices = _slices(encoder, examples, view, limit, skipped)
    answered: list[Answered] = []
    passed = 0
    for part in prefetch(lambda number: next(slices, None), count()):
        if part is None:
            break
        full, crop = ([both[policy] for both in part.prompts] for policy in (0, 1))
        if full:
            # Together, since a token step takes little longer for twice the rows.
            texts = _greedy(backend, encoder, [*full, *crop], max_tokens, budget, progress)
            both = zip(texts[: len(full)], texts[len(full) :], strict=True)
            answered += [
                judge(row, examples[row], *said) for row, said in zip(part.rows, both, strict=True)
            ]
        progress(2 * (part.passed - passed - len(full)))
        passed = part.passed
    return answered


def _slices(
    encoder: Encoder,
    examples: Sequence[Example],
    view: ViewOptions,
    limit: int | None,
    skipped: Skipped,
) -> Iterator[Slice]:
    """The usable examples with their prompts, as many at a time as SLICE and SLICE_BYTES allow."""
    # a control trains on another view, but is measured on the evidence
    crop = view.model_copy(update={"kind": "crop"})
    rows: list[int] = []
    prompts: list[tuple[Prompt, Prompt]] = []
    held = 0
    for row in range(len(examples)):
        try:
            both = encode(encoder, examples[row], crop, limit)
        except Unusable as error:
            skipped.add(examples[row], error)
            continue
        size = sum(map(_bytes, both))
        if rows and (len(rows) == SLICE or held + size > SLICE_BYTES):
            yield Slice(tuple(rows), tuple(prompts), row)
            rows, prompts, held = [], [], 0
        rows.append(row)
        prompts.append(both)
        held += size
    yield Slice(tuple(rows), tuple(prompts), len(examples))


def _bytes(prompt: Prompt) -> int:
    """Bytes of a prompt's own arrays; tokens and positions are shared, and small beside the
    pixels."""
    return sum(array.nbytes for array in prompt.images.values())


def accuracies(answered: Sequence[Answered]) -> dict[str, Any]:
    """Agreement of full image and crop, and, over the rows with answers, both accuracies and the
    gap; all with 95 % intervals."""
    same = np.array([matches(one.full, one.crop) for one in answered], dtype=np.float64)
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
    """(full after - full before) / (crop before - full before), a fraction, with its interval;
    empty where no gap is certain, since what is divided by it may then be anything.

    Losing crop accuracy never counts as success: the crop's accuracy is taken before training.
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
    """The answers to the examples that were answered both times: what is compared is of the same
    rows."""
    both = {one.row for one in before} & {one.row for one in after}
    first, second = (
        sorted((one for one in answered if one.row in both), key=lambda one: one.row)
        for answered in (before, after)
    )
    return first, second


def changes(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Any]:
    """What training did to both accuracies, and a `verdict` on it; `before` and `after` are
    `paired`.

    `full_change` and `crop_change` are after less before, with their paired intervals. A change is
    certain where its interval excludes 0. The verdict is "collapsed" where an accuracy fell for
    certain to less than COLLAPSED of what it was; else "worse" where one fell for certain; else
    "improved" where the full image's rose for certain; else "unchanged". Without answers nothing
    can be told: the verdict is None.
    """
    columns = [*correct(before), *correct(after)]
    if not len(columns[0]):
        return {"verdict": None}
    found: dict[str, Any] = {}
    fell, collapsed = False, False
    for name, first, second in zip(
        ("full_change", "crop_change"), columns[:2], columns[2:], strict=True
    ):
        found |= with_interval(name, [first, second], lambda first, second: second - first)
        down = found[f"{name}_interval"][1] < 0
        fell, collapsed = (
            fell or down,
            collapsed or (down and second.sum() < COLLAPSED * first.sum()),
        )
    improved = found["full_change_interval"][0] > 0
    verdict = (
        "collapsed" if collapsed else "worse" if fell else "improved" if improved else "unchanged"
    )
    return {"verdict": verdict, **found}


def _greedy(
    backend: Backend,
    encoder: Encoder,
    prompts: Sequence[Prompt],
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None],
) -> list[str]:
    unused = np.zeros((len(prompts), 1, max_tokens), np.float32)
    sampling = Sampling(0.0, encoder.stop, encoder.banned)
    return [
        encoder.decode(group[0].tokens.tolist())
        for group in sample(backend, prompts, unused, sampling, budget, progress)
    ]


def judge(row: int, example: Example, full: str, crop: str) -> Answered:
    """The answers on the full image and on the crop of an example, each right or wrong where the
    example has an answer."""
    if example.answer is None:
        return Answered(example.id, None, full, crop, None, None, row)
    right = [matches(text, example.answer, example.choices) for text in (full, crop)]
    return Answered(example.id, example.answer, full, crop, right[0], right[1], row)


def correct(answered: Sequence[Answered]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Of the rows with an answer, 1 where the full image's is right and 0 where it is wrong; and
    the same of the crop."""
    judged = [one for one in answered if one.answer is not None]
    return np.array([one.full_right for one in judged], np.float64), np.array(
        [one.crop_right for one in judged], np.float64
    )
