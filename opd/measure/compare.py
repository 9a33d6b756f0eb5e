"""Compares views before training: what the model answers on each, for the same rows.

The model that teaches is the model that is trained, so a view on which it answers better than on
the full image is one that it can learn from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opd.backend import Backend
from opd.data.answers import matches
from opd.measure.gap import Answered, accuracies, judge
from opd.measure.intervals import share_of, with_interval
from opd.measure.replies import Prompts, Reply, replies
from opd.progress import Quiet
from opd.types import Encoder, Example
from opd.views.usable import Skipped, Unusable, encode_full, encode_view
from opd.views.view import ViewOptions

FULL = "full"


@dataclass(frozen=True)
class Seen:
    """The replies to one example by view, and, if it has a reference answer, whether each is right.
    `row`: the index among the measured examples."""

    row: int
    replies: Mapping[str, Reply]
    right: Mapping[str, bool]


@dataclass(frozen=True)
class Comparison:
    """The replies to all examples. `names`: the full image, then every view. `lacking`: by view,
    the examples that it cannot be made of, which have the other replies."""

    names: tuple[str, ...]
    seen: tuple[Seen, ...]
    lacking: Mapping[str, Skipped]


def student_of(name: str) -> str:
    """The name of what the student sees in training on the view `name`, where that differs."""
    return f"{name} (student)"


def names_of(views: Mapping[str, ViewOptions]) -> tuple[str, ...]:
    """The names of all that is measured, in order: the full image, every view, and what the student
    sees in training on it, where that differs."""
    names = [FULL]
    for name, options in views.items():
        names += [student_of(name)] if options.view.changes_student else []
        names += [name] if name != FULL else []
    return tuple(names)


def compare(
    backend: Backend,
    encoder: Encoder,
    examples: Sequence[Example],
    views: Mapping[str, ViewOptions],
    max_tokens: int,
    budget: int,
    progress: Callable[[int], None] = lambda prompts: None,
    limit: int | None = None,
    skipped: Skipped | None = None,
) -> Comparison:
    """The student's greedy answers to every example on the full image and on each of `views`, whose
    options name them and hold the run's seed.

    An example of which a view cannot be made, since it has no boxes for instance, is answered
    without that view. One whose full image cannot be used is left out and added to `skipped`. Other
    arguments as for `opd.measure.gap.greedy_answers`; `progress` counts len(names_of(views))
    prompts for each example.
    """
    names = names_of(views)
    lacking = {name: Skipped(Quiet()) for name in views}

    def prompts_of(example: Example) -> Prompts:
        prompts = {FULL: encode_full(encoder, example, limit)}
        for name, options in views.items():
            try:
                if options.view.changes_student:
                    prompts[student_of(name)] = encode_full(encoder, example, limit, options)
                if name != FULL:
                    prompts[name] = encode_view(encoder, example, options, limit)
            except Unusable as error:
                lacking[name].add(example, error)
        return prompts

    found = replies(
        backend,
        encoder,
        examples,
        names,
        prompts_of,
        max_tokens,
        budget,
        progress,
        skipped or Skipped(Quiet()),
    )
    seen = tuple(_seen(row, examples[row], said) for row, said in found)
    return Comparison(names, seen, lacking)


def report(comparison: Comparison, examples: Sequence[Example]) -> dict[str, Any]:
    """Measured numbers: those of `opd.measure.gap.accuracies`, where the crop is among the views;
    `views` by name; `pairs` of views, over the rows that have both; and `full_alone`, the number of
    rows of which no view but the full image could be made. `examples`: those that were compared.

    Of a view: `rows`, `rows_with_answer`; `accuracy` and its `interval`; `agreement`, the share of
    rows with the full image's answer; `certainty`, the mean log-probability of a token of the
    model's own answer, in nats; `prompt_tokens`, their mean; `lacking`, the number of rows that it
    cannot be made of, by reason. Of a pair: `difference`, the accuracy on `b` less that on `a`, and
    its `interval`; `certainty_difference`, the same of certainty; `agreement`. Intervals are of
    95 %, those of pairs paired over rows. What no row has is left out.
    """
    numbers = accuracies(_as_answered(comparison, examples))
    if "crop" not in comparison.names:
        numbers.pop("crop_rows", None)  # nobody asked for the crop
    pairs = (_pair(comparison.seen, a, b) for a, b in combinations(comparison.names, 2))
    views = len(comparison.names)
    return {
        **numbers,
        "views": {name: _view(comparison, name) for name in comparison.names},
        "pairs": [pair for pair in pairs if pair],
        "full_alone": sum(len(one.replies) == 1 < views for one in comparison.seen),
    }


def _as_answered(comparison: Comparison, examples: Sequence[Example]) -> list[Answered]:
    """The answers on the full image, and on the crop if it is among the views, as
    `opd.measure.gap.greedy_answers` gives them."""

    def text(one: Seen, name: str) -> str | None:
        return one.replies[name].text if name in one.replies else None

    return [
        judge(one.row, examples[one.row], one.replies[FULL].text, text(one, "crop"))
        for one in comparison.seen
    ]


def _seen(row: int, example: Example, said: Mapping[str, Reply]) -> Seen:
    if example.answer is None:
        return Seen(row, said, {})
    answer, choices = example.answer, example.choices
    right = {name: matches(reply.text, answer, choices) for name, reply in said.items()}
    return Seen(row, said, right)


def _view(comparison: Comparison, name: str) -> dict[str, Any]:
    """The numbers of one view, as in `report`."""
    seen = [one for one in comparison.seen if name in one.replies]
    judged = [one for one in seen if one.right]
    result: dict[str, Any] = {"rows": len(seen), "rows_with_answer": len(judged)}
    if judged:
        accuracy = share_of("accuracy", _array(one.right[name] for one in judged))
        result |= {"accuracy": accuracy["accuracy"], "interval": accuracy["accuracy_interval"]}
    if seen and name != FULL:
        result |= share_of("agreement", _agreement(seen, FULL, name))
    if seen:
        certainty = _array(one.replies[name].certainty for one in seen)
        result |= with_interval("certainty", [certainty], lambda mean: mean)
        tokens = _array(one.replies[name].prompt_tokens for one in seen)
        result["prompt_tokens"] = float(tokens.mean())
    if name in comparison.lacking:
        kinds = comparison.lacking[name].kinds.values()
        result["lacking"] = dict(Counter(kinds).most_common())
    return result


def _pair(rows: Sequence[Seen], a: str, b: str) -> dict[str, Any]:
    """The numbers of a pair of views, as in `report`; empty if no row has both."""
    seen = [one for one in rows if a in one.replies and b in one.replies]
    judged = [one for one in seen if one.right]
    if not seen:
        return {}
    result: dict[str, Any] = {"a": a, "b": b, "rows": len(seen), "rows_with_answer": len(judged)}
    if judged:
        columns = [_array(one.right[name] for one in judged) for name in (a, b)]
        difference = with_interval("difference", columns, lambda a, b: b - a)
        result["difference"] = difference["difference"]
        result["interval"] = difference["difference_interval"]
    certainties = [_array(one.replies[name].certainty for one in seen) for name in (a, b)]
    result |= with_interval("certainty_difference", certainties, lambda a, b: b - a)
    return {**result, **share_of("agreement", _agreement(seen, a, b))}


def _agreement(seen: Sequence[Seen], a: str, b: str) -> NDArray[np.float64]:
    """An array [rows]: 1 where the answers on two views match."""
    return _array(matches(one.replies[a].text, one.replies[b].text) for one in seen)


def _array(values: Any) -> NDArray[np.float64]:
    return np.array(list(values), np.float64)
