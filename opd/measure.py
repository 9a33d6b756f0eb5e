"""Measuring the regional-to-global gap: accuracy on the crop less accuracy on the full image, with 95 % intervals:
Wilson's of shares, and of what compares two of them the paired bootstrap's.

Answers are read here and nowhere else. The student answers greedily, once on the full image and once on the evidence crop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from opd.ahead import ahead
from opd.answers import matches
from opd.backend import Backend
from opd.options import Options
from opd.paths import PathText
from opd.questions import student_question, teacher_question
from opd.randomness import Purpose, generator
from opd.rollout import sample
from opd.types import Encoder, Example, Prompt, Sampling
from opd.view import MAX_PIXELS, ViewOptions, student_images, teacher_images

SLICE = 64
"""Examples that are encoded at a time: the pixels of thousands of large images would fill the memory."""

RESAMPLES = 2000
CONFIDENCE = 0.95


class MeasureOptions(Options):
    """What the table before and after training is measured on."""

    path: PathText = Field(
        "", description="Data that is measured; empty: fresh scenes where data.path is tiny, else rows spread over the training data."
    )
    count: int = Field(200, ge=0, description="Rows that are measured before and after; 0: none.")
    max_tokens: int = Field(64, ge=1, description="Longest answer, in tokens.")
    every: int = Field(0, ge=0, description="Steps between measurements while training, into accuracy.jsonl; 0: before and after only.")


@dataclass(frozen=True)
class Answered:
    """What the model said of one example; `full_right` and `crop_right` are None where the example has no answer."""

    id: str
    answer: str | Sequence[str] | None
    full: str
    crop: str
    full_right: bool | None
    crop_right: bool | None


def answer(
    backend: Backend,
    encoder: Encoder,
    examples: Sequence[Example],
    view: ViewOptions,
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None] = lambda prompts: None,
) -> list[Answered]:
    """Greedy answers to every example on its full image and on its crop; `budget` in padded tokens, `progress` in prompts."""
    crop = view.model_copy(update={"kind": "crop"})  # a control trains on another view, but is measured on the evidence
    answered: list[Answered] = []

    def encode(start: int) -> tuple[Sequence[Example], list[Prompt], list[Prompt]]:
        part = examples[start : start + SLICE]
        return part, [encode_student(encoder, one) for one in part], [encode_teacher(encoder, one, crop) for one in part]

    for part, full, enlarged in ahead(encode, range(0, len(examples), SLICE)):
        # Together, since a token step takes little longer for twice the rows.
        texts = _greedy(backend, encoder, [*full, *enlarged], max_tokens, budget, progress)
        answered += [_judge(one, *both) for one, *both in zip(part, texts[: len(part)], texts[len(part) :], strict=True)]
    return answered


def encode_student(encoder: Encoder, example: Example) -> Prompt:
    """The prompt of the full image."""
    return encoder.encode(student_images(example), student_question(example))


def encode_teacher(encoder: Encoder, example: Example, view: ViewOptions) -> Prompt:
    """The same prompt with the images swapped for the teacher's, and the question where the example gives another one."""
    bound = getattr(encoder, "max_pixels", None)  # an encoder may say up to which size its images keep what a crop is enlarged to
    images = teacher_images(example, view, bound("teacher") if bound else MAX_PIXELS)
    return encoder.encode(images, teacher_question(example, view), "teacher")


def accuracies(answered: Sequence[Answered]) -> dict[str, Any]:
    """Agreement of full image and crop, and, over the rows with answers, both accuracies and the gap; all with 95 % intervals."""
    same = np.array([matches(one.full, one.crop) for one in answered], dtype=np.float64)
    full, crop = _right(answered)
    result: dict[str, Any] = {
        "rows": len(answered),
        "rows_with_answer": len(full),
        **_share_of("agreement", same),
    }
    if len(full):
        result |= _share_of("full_accuracy", full)
        result |= _share_of("crop_accuracy", crop)
        result |= _with_interval("gap", [full, crop], lambda full, crop: crop - full)
    return result


def gap_closed(before: Sequence[Answered], after: Sequence[Answered]) -> dict[str, Any]:
    """(full after - full before) / (crop before - full before), a fraction, with its interval; empty where no gap is certain, since what
    is divided by it may then be anything.

    Losing crop accuracy never counts as success: the crop's accuracy is taken before training.
    """
    full_before, crop_before = _right(before)
    full_after, _ = _right(after)
    if not len(full_before) or accuracies(before)["gap_interval"][0] <= 0:
        return {}
    columns = [full_before, crop_before, full_after]
    return _with_interval("gap_closed", columns, lambda before, crop, after: _share(after - before, crop - before))


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
    return [encoder.decode(group[0].tokens.tolist()) for group in sample(backend, prompts, unused, sampling, budget, progress)]


def _judge(example: Example, full: str, crop: str) -> Answered:
    if example.answer is None:
        return Answered(example.id, None, full, crop, None, None)
    right = [matches(text, example.answer, example.choices) for text in (full, crop)]
    return Answered(example.id, example.answer, full, crop, right[0], right[1])


def _right(answered: Sequence[Answered]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    judged = [one for one in answered if one.answer is not None]
    return np.array([one.full_right for one in judged], np.float64), np.array([one.crop_right for one in judged], np.float64)


def _share_of(name: str, rows: NDArray[np.float64]) -> dict[str, Any]:
    """The share of rows that are 1, with Wilson's 95 % interval, which is also right where the share is 0 or 1, or the rows are few."""
    share, count, z = float(rows.mean()), len(rows), NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    middle, reach = share + z**2 / (2 * count), z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    ends = ((middle + sign * reach) / (1 + z**2 / count) for sign in (-1, 1))
    return {name: share, f"{name}_interval": [min(1.0, max(0.0, end)) for end in ends]}


def _with_interval(name: str, columns: Sequence[NDArray[np.float64]], statistic: Callable[..., Any]) -> dict[str, Any]:
    """A statistic of column means, and its 95 % percentile interval over rows drawn together from all columns."""
    drawn = _resamples(len(columns[0]))
    resampled = statistic(*(drawn @ column for column in columns))
    low, high = np.nanquantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {name: float(statistic(*(column.mean() for column in columns))), f"{name}_interval": [float(low), float(high)]}


@cache
def _resamples(rows: int) -> NDArray[np.float64]:
    """Shares [RESAMPLES, rows] of the rows in each bootstrap sample."""
    return generator(0, Purpose.BOOTSTRAP).multinomial(rows, np.full(rows, 1 / rows), size=RESAMPLES) / rows


def _share(part: Any, whole: Any) -> Any:
    """part / whole, and nan where a resample has no gap."""
    return np.where(np.asarray(whole) > 0, part / np.where(np.asarray(whole) > 0, whole, 1.0), np.nan)
