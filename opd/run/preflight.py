"""Checks before the first step how many rows can be used, and which settings would make more of
them usable.

Rows are checked by the sizes of their images, without decoding them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from statistics import median
from typing import TypeAlias

from PIL.Image import Image

from opd.data import spread
from opd.data.images import image_size
from opd.errors import DataError, ModelError, plural
from opd.progress import Progress
from opd.prompts.encoder import PromptEncoder
from opd.prompts.processor import ProcessorEncoder
from opd.run.recipe import Recipe
from opd.types import Encoder, Example, ImageSource
from opd.views.usable import Unusable, lengths, name, reasons

Size: TypeAlias = Callable[..., tuple[int, int]]
"""`image_size`, or the same with a cache."""

SAMPLE = 64
"""Number of rows of large data that are checked, evenly spread."""

FEW = 16
"""Number of rows that are checked if the model's own processor has to encode blank images to give
the length of a prompt."""


@dataclass(frozen=True)
class Inspection:
    """The result of checking rows: `checked` of `rows` rows.

    `limit`: longest prompt in tokens. `long`: rows above the limit, with the tokens of their longer
    prompt. `faulty`: other rows that cannot be used, and why. `advice`: settings with which the
    long rows can be used, for a message.
    """

    limit: int
    rows: int
    checked: int
    long: tuple[tuple[Example, int], ...]
    faulty: tuple[tuple[Example, Unusable], ...]
    advice: str = ""

    @property
    def usable(self) -> int:
        """Number of checked rows that can be used."""
        return self.checked - len(self.long) - len(self.faulty)

    def lines(self) -> list[str]:
        """A line about the rows above the limit if there are any, and a line about other rows that
        cannot be used if there are any."""
        lines = []
        if self.long:
            verb = "is" if len(self.long) == 1 else "are"
            middle = median(tokens for _, tokens in self.long)
            lines.append(
                f"{self._of(len(self.long))} {verb} above data.max_prompt_tokens = {self.limit}"
                f" (median {middle:,.0f}); {self.advice}"
            )
        if self.faulty:
            first, error = self.faulty[0]
            why = (
                f"{reasons(error.kind for _, error in self.faulty)}; the first is "
                if len(self.faulty) > 1
                else ""
            )
            lines.append(
                f"{self._of(len(self.faulty))} cannot be used: {why}{name(first)}: {error}"
            )
        return lines

    def _of(self, count: int) -> str:
        """`count` and the share of checked rows in words, such as "3 of 64 rows (4.7%)"."""
        share = "" if count == self.checked else f" ({count / self.checked:.1%})"
        total = "" if self.checked == self.rows else f", of {self.rows:,} in all,"
        return f"{count:,} of {plural(self.checked, 'row')}{share}{total}"


def check(
    recipe: Recipe, encoder: Encoder, examples: Sequence[Example], progress: Progress
) -> None:
    """Tells `progress` how many rows cannot be used, and which settings would change that. Raises
    DataError if no row can be trained on."""
    for line in refuse(recipe, encoder, examples).lines():
        progress.note(line)


def refuse(
    recipe: Recipe, encoder: Encoder, examples: Sequence[Example], read: int | None = None
) -> Inspection:
    """The result of `inspect_rows`, with the same arguments. Raises DataError if no row can be
    trained on."""
    checked = getattr(examples, "checked", examples)
    if checked and not any(example.weight > 0 for example in checked):
        raise DataError(
            f"every row of {recipe.data.path} has weight 0, so nothing would be learnt; give rows a"
            " weight above 0"
        )
    inspection = inspect_rows(recipe, encoder, examples, read)
    if inspection.checked and not inspection.usable and len(examples) != read:
        raise DataError("; ".join(inspection.lines()))
    return inspection


def inspect_rows(
    recipe: Recipe, encoder: Encoder, examples: Sequence[Example], read: int | None = None
) -> Inspection:
    """Checks a sample of the rows; if none of the sample can be used, checks more until one can.

    `read`: the most rows that were read of the data into `examples`; None: `examples` are all rows.
    """
    sample = FEW if isinstance(encoder, ProcessorEncoder) else SAMPLE
    first = spread(examples, sample)
    total = len(examples) if len(examples) < SAMPLE else getattr(examples, "rows", len(examples))
    limit, cached_size = recipe.data.max_prompt_tokens, cache(image_size)

    def size(source: ImageSource, max_pixels: int) -> tuple[int, int]:
        if isinstance(source, Image):
            return image_size(source, max_pixels)
        return cached_size(source, max_pixels)

    checked = 0
    long: list[tuple[Example, int]] = []
    faulty: list[tuple[Example, Unusable]] = []
    others = getattr(examples, "checked", examples)
    for example in chain(first, others if len(first) < len(examples) else ()):
        if checked >= len(first) and len(long) + len(faulty) < checked:
            break
        if checked >= len(first) and any(example is row for row in first):
            continue
        checked += 1
        try:
            tokens = max(lengths(encoder, example, recipe.seeded_view, size))
        except Unusable as error:
            faulty.append((example, error))
            continue
        if tokens > limit:
            long.append((example, tokens))
    advice = _advice(recipe, encoder, long, size) if long else ""
    return Inspection(limit, total, checked, tuple(long), tuple(faulty), advice)


def _advice(
    recipe: Recipe, encoder: Encoder, long: Sequence[tuple[Example, int]], size: Size
) -> str:
    """Settings with which the rows above the limit could be used, for a message: smaller images if
    these make a difference, else a higher limit."""
    most = max(tokens for _, tokens in long)
    raised = f"set data.max_prompt_tokens={most}"
    count, bounds = _smaller(recipe, encoder, [example for example, _ in long], size)
    if not count:
        return f"{raised}, or shorten the questions"
    settings = " and ".join(f"model.{key}={value}" for key, value in bounds.items())
    if count == len(long):
        return f"set {settings}"
    return f"set {settings} to keep {count:,} of them, or {raised} to keep all"


def _smaller(
    recipe: Recipe, encoder: Encoder, long: Sequence[Example], size: Size
) -> tuple[int, dict[str, int]]:
    """The number of `long` rows that smaller images bring within the limit, and the largest bounds
    on pixels that do it for all of these, by key of the model section; (0, {}) if there are none.
    """
    if not isinstance(encoder, PromptEncoder) or isinstance(encoder, ProcessorEncoder):
        return 0, {}
    now, limit = recipe.model.pixels(), recipe.data.max_prompt_tokens
    keys = ["max_pixels"]
    if now["teacher_max_pixels"]:  # else the teacher's bound follows the student's
        both = [lengths(encoder, example, recipe.seeded_view, size) for example in long]
        keys = []
        if max(student for student, _ in both) > limit:
            keys.append("max_pixels")
        if max(teacher for _, teacher in both) > limit:
            keys.append("teacher_max_pixels")

    def within(bound: int, examples: Sequence[Example]) -> list[Example]:
        other = encoder.bounded(**{**now, **dict.fromkeys(keys, bound)})
        return [
            example
            for example in examples
            if max(lengths(other, example, recipe.seeded_view, size)) <= limit
        ]

    low = max(1, now["min_pixels"] or 1, now["teacher_min_pixels"] or 1)
    high = max(encoder.max_pixels("student"), encoder.max_pixels("teacher"))
    try:
        fixable = within(low, long)
    except (ModelError, Unusable):  # the family or its processor takes no such bound
        return 0, {}
    if not fixable:
        return 0, {}
    # A sample decides the bound; if it does not suit all rows, some of the others join the sample.
    decisive = fixable[:SAMPLE]
    while True:
        bound = _largest(low, high, within, decisive)
        fitting = {id(example) for example in within(bound, fixable)}
        others = [example for example in fixable if id(example) not in fitting]
        if not others:
            return len(fixable), dict.fromkeys(keys, bound)
        decisive = [*decisive, *others[:SAMPLE]]


def _largest(
    low: int,
    high: int,
    within: Callable[[int, Sequence[Example]], list[Example]],
    examples: Sequence[Example],
) -> int:
    """The largest bound in `low`..`high` - 1, rounded down to three digits where that holds too,
    with which all examples are within the limit; `low` is known to do it."""

    def fits(bound: int) -> bool:
        return len(within(bound, examples)) == len(examples)

    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    rounded = low - low % 10 ** max(0, len(str(low)) - 3)
    return rounded if fits(rounded) else low
