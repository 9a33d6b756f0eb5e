"""Before the first step: how many rows can be used, and what would keep the others.

Rows are looked at by the sizes of their images, so nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
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
from opd.types import Encoder, Example
from opd.views.usable import Unusable, lengths, name, reasons

Size: TypeAlias = Callable[..., tuple[int, int]]
"""`image_size`, or one that remembers."""

SAMPLE = 64
"""Rows of large data that are looked at, evenly spread."""

FEW = 16
"""The same where a model's own processor has to encode blank images to tell the length of a
prompt."""


@dataclass(frozen=True)
class Looked:
    """What was seen of the rows: `long` holds those above the limit with the tokens of their longer
    prompt, `faulty` all others that cannot be used; `looked` rows of `rows` were looked at.
    `advice` says what would keep the long ones."""

    limit: int
    rows: int
    looked: int
    long: tuple[tuple[Example, int], ...]
    faulty: tuple[tuple[Example, Unusable], ...]
    advice: str = ""

    @property
    def usable(self) -> int:
        """Rows that can be used, of those that were looked at."""
        return self.looked - len(self.long) - len(self.faulty)

    def said(self) -> list[str]:
        """One line for the rows above the limit, and one for the others that cannot be used; none
        where there are none."""
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
        """A number of rows as a share."""
        share = "" if count == self.looked else f" ({count / self.looked:.1%})"
        return f"{count:,} of {plural(self.looked, 'row')}{share}" + (
            "" if self.looked == self.rows else f", of {self.rows:,} in all,"
        )


def check(
    recipe: Recipe, encoder: Encoder, examples: Sequence[Example], progress: Progress
) -> None:
    """Tells how many rows cannot be used, and what would keep them. Raises DataError where nothing
    could be learnt from any row."""
    for line in refuse(recipe, encoder, examples).said():
        progress.note(line)


def refuse(
    recipe: Recipe, encoder: Encoder, examples: Sequence[Example], read: int | None = None
) -> Looked:
    """What was seen of the rows. Raises DataError where nothing could be learnt from any of them;
    see `look`."""
    if examples and not any(example.weight > 0 for example in examples):
        raise DataError(
            f"every row of {recipe.data.path} has weight 0, so nothing would be learnt; give rows a"
            " weight above 0"
        )
    found = look(recipe, encoder, examples, read)
    if found.looked and not found.usable and len(examples) != read:
        raise DataError("; ".join(found.said()))
    return found


def look(
    recipe: Recipe, encoder: Encoder, examples: Sequence[Example], read: int | None = None
) -> Looked:
    """Looks at a sample of the rows; at more of them where not one of the sample can be used, until
    one can.

    Where `read` is given, `examples` are at most so many that were read of the data.
    """
    sample = FEW if isinstance(encoder, ProcessorEncoder) else SAMPLE
    first = spread(examples, sample)
    total = len(examples) if len(examples) < SAMPLE else getattr(examples, "rows", len(examples))
    limit, known = recipe.data.max_prompt_tokens, cache(image_size)

    def size(source: Path | Image, max_pixels: int) -> tuple[int, int]:
        return (
            known(source, max_pixels)
            if isinstance(source, Path)
            else image_size(source, max_pixels)
        )

    looked = 0
    long: list[tuple[Example, int]] = []
    faulty: list[tuple[Example, Unusable]] = []
    for example in chain(first, examples if len(first) < len(examples) else ()):
        if looked >= len(first) and len(long) + len(faulty) < looked:
            break
        if looked >= len(first) and any(example is one for one in first):
            continue
        looked += 1
        try:
            tokens = max(lengths(encoder, example, recipe.view, size))
        except Unusable as error:
            faulty.append((example, error))
            continue
        if tokens > limit:
            long.append((example, tokens))
    advice = _advice(recipe, encoder, long, size) if long else ""
    return Looked(limit, total, looked, tuple(long), tuple(faulty), advice)


def _advice(
    recipe: Recipe, encoder: Encoder, long: Sequence[tuple[Example, int]], size: Size
) -> str:
    """What would keep rows that are above the limit: smaller images where those are the cause."""
    most = max(tokens for _, tokens in long)
    raised = f"set data.max_prompt_tokens={most}"
    kept, bounds = _smaller(recipe, encoder, [example for example, _ in long], size)
    if not kept:
        return f"{raised}, or shorten the questions"
    settings = " and ".join(f"model.{key}={value}" for key, value in bounds.items())
    return (
        f"set {settings}"
        if kept == len(long)
        else f"set {settings} to keep {kept:,} of them, or {raised} to keep all"
    )


def _smaller(
    recipe: Recipe, encoder: Encoder, long: Sequence[Example], size: Size
) -> tuple[int, dict[str, int]]:
    """The largest bounds on images with which all rows are within the limit that smaller images can
    bring there, and their number."""
    if not isinstance(encoder, PromptEncoder) or isinstance(encoder, ProcessorEncoder):
        return 0, {}
    now, limit = recipe.model.pixels(), recipe.data.max_prompt_tokens
    keys = ["max_pixels"]
    if now["teacher_max_pixels"]:  # else the teacher's follows the student's
        both = [lengths(encoder, example, recipe.view, size) for example in long]
        policies = zip(("max_pixels", "teacher_max_pixels"), zip(*both, strict=True), strict=True)
        keys = [key for key, tokens in policies if max(tokens) > limit]

    def within(bound: int, examples: Sequence[Example]) -> list[Example]:
        other = encoder.bounded(**{**now, **dict.fromkeys(keys, bound)})
        return [
            example
            for example in examples
            if max(lengths(other, example, recipe.view, size)) <= limit
        ]

    low = max(1, now["min_pixels"] or 1, now["teacher_min_pixels"] or 1)
    high = max(encoder.max_pixels("student"), encoder.max_pixels("teacher"))
    try:
        kept = within(low, long)
    except (
        ModelError,
        Unusable,
    ):  # a family without such a bound; or none that its processor takes
        return 0, {}
    if not kept:
        return 0, {}
    decisive = kept[:SAMPLE]  # of many rows some are enough, if all are looked at in the end
    while True:
        named = _largest(low, high, within, decisive)
        fitting = {id(example) for example in within(named, kept)}
        others = [example for example in kept if id(example) not in fitting]
        if not others:
            return len(kept), dict.fromkeys(keys, named)
        decisive = [*decisive, *others[:SAMPLE]]


def _largest(
    low: int,
    high: int,
    within: Callable[[int, Sequence[Example]], list[Example]],
    examples: Sequence[Example],
) -> int:
    """The largest bound to three digits, from `low` to below `high`, with which all examples are
    within the limit, as with `low`."""

    def fits(bound: int) -> bool:
        return len(within(bound, examples)) == len(examples)

    while low < high - 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    rounded = low - low % 10 ** max(0, len(str(low)) - 3)
    return rounded if fits(rounded) else low
