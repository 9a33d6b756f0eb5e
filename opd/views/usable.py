"""One row as the two policies see it, or the reason why it cannot be used.

Training and measuring encode rows here alone, so that both skip the same rows, count them and name
them.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from opd.data.images import image_size
from opd.errors import DataError, OpdError, one_line, plural
from opd.progress import Progress
from opd.types import MAX_PIXELS, Encoder, Example, Prompt, SizedEncoder
from opd.views.images import student_images, teacher_images, teacher_sizes, views_per_image
from opd.views.questions import student_question, teacher_question
from opd.views.view import ViewOptions

TOLD = 5
"""Rows that are told one by one; further ones are counted."""

ITS_OWN = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\S*\d\S*|\S+\.\w+:?")
"""Parts of a message that belong to one row: quotations, paths, names of files and numbers."""


class Unusable(DataError):
    """A row cannot be used; `kind` is the reason without what belongs to this row alone."""

    def __init__(self, reason: str, kind: str = "") -> None:
        super().__init__(reason)
        self.kind = (
            kind
            or re.sub(r"(\.\.\.[\s,x:;]*)+", "... ", ITS_OWN.sub("...", reason)).strip(" .:;,")
            or reason
        )


class Skipped:
    """The rows that could not be used: `reasons` by row, and `kinds` of reasons by row. A row is
    told once, and only the first few are.

    Safe for threads: rows are encoded ahead on another thread.
    """

    def __init__(self, progress: Progress, earlier: Iterable[Mapping[str, str]] = ()) -> None:
        """`earlier`: those of an earlier part of the same run, as `records` gives them; they are
        not told again."""
        self.reasons: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self._progress = progress
        self._handed = 0
        self._lock = threading.Lock()
        for row in earlier:
            self.reasons[row["row"]], self.kinds[row["row"]] = row["reason"], row["kind"]
            self._handed += 1

    def add(self, example: Example, error: Unusable) -> None:
        """Counts a row, and tells it where it is a new one."""
        row = name(example)
        with self._lock:
            new = row not in self.reasons
            self.reasons[row], self.kinds[row] = str(error), error.kind
            count = len(self.reasons)
        if new and count <= TOLD:
            self._progress.note(f"skipped {row}: {error}")
        elif new and count == TOLD + 1:
            self._progress.note(
                "more rows are skipped; they are counted, and no longer told one by one"
            )

    def records(self) -> list[dict[str, str]]:
        """Every row with its reason, in the order in which they fell out."""
        with self._lock:
            return [
                {"row": row, "reason": reason, "kind": self.kinds[row]}
                for row, reason in self.reasons.items()
            ]

    def new(self) -> list[dict[str, str]]:
        """The `records` since the last call."""
        found = self.records()[self._handed :]
        self._handed += len(found)
        return found

    def why(self) -> str:
        """The reasons in words, the most frequent first, each with the number of its rows."""
        return reasons(row["kind"] for row in self.records())


def reasons(kinds: Iterable[str]) -> str:
    """Kinds of reasons in words, the most frequent first, each with the number of its rows."""
    return ", ".join(
        f"{plural(count, 'row')}: {kind}" for kind, count in Counter(kinds).most_common()
    )


def encode_student(encoder: Encoder, example: Example) -> Prompt:
    """The prompt of the full image."""
    return encoder.encode(student_images(example), student_question(example))


def encode_teacher(encoder: Encoder, example: Example, view: ViewOptions) -> Prompt:
    """The same prompt with the images swapped for the teacher's, and the question where the example
    gives another one."""
    # an encoder may say up to which size its images keep what a crop is enlarged to
    bound = getattr(encoder, "max_pixels", None)
    images = teacher_images(example, view, bound("teacher") if bound else MAX_PIXELS)
    return encoder.encode(images, teacher_question(example, view), "teacher")


def encode(
    encoder: Encoder, example: Example, view: ViewOptions, limit: int | None = None
) -> tuple[Prompt, Prompt]:
    """The student's and the teacher's prompt of a row, each of at most `limit` tokens.

    Raises Unusable where the row has none, and other errors of `opd.errors` where no row could have
    one.
    """
    views = sum(views_per_image(example, view))
    if limit and views > limit:  # a view takes a token or more: no need to cut any
        raise Unusable(f"{views:,} views, {above(limit)}", above(limit))
    with _guarded(example):
        prompts = encode_student(encoder, example), encode_teacher(encoder, example, view)
    longest = max(map(len, prompts))
    if limit and longest > limit:
        raise Unusable(*too_long(longest, limit))
    return prompts


def lengths(
    encoder: Encoder,
    example: Example,
    view: ViewOptions,
    size_of: Callable[..., tuple[int, int]] = image_size,
) -> tuple[int, int]:
    """Tokens of both prompts of a row, from the sizes of its images where the encoder can tell them
    so; raises as `encode` does."""
    if not isinstance(encoder, SizedEncoder):
        student, teacher = encode(encoder, example, view)
        return len(student), len(teacher)
    with _guarded(example):
        full = [size_of(source, example.max_image_pixels) for source in example.images]
        crop = teacher_sizes(example, view, encoder.max_pixels("teacher"), size_of)
        return (
            encoder.length(full, student_question(example)),
            encoder.length(crop, teacher_question(example, view), "teacher"),
        )


@contextmanager
def _guarded(example: Example) -> Iterator[None]:
    """Makes a fault of one row Unusable; MemoryError is none of the row's."""
    for text in (example.question, example.teacher_question or "", *example.choices):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Unusable("the question holds half of a surrogate pair, which is no character")
    try:
        yield
    except DataError as error:
        raise Unusable(str(error)) from error
    except (OpdError, MemoryError):  # a machine without memory would lose every row, one by one
        raise
    except (
        Exception
    ) as error:  # whatever the libraries that read images and texts raise for one of them
        raise Unusable(
            f"the row cannot be encoded: {one_line(error)}", "the row cannot be encoded"
        ) from error


def too_long(tokens: int, limit: int) -> tuple[str, str]:
    """The reason of a prompt above the limit, and its kind."""
    return f"prompt of {plural(tokens, 'token')}, {above(limit)}", above(limit)


def above(limit: int) -> str:
    """The kind of reason of every row above the limit."""
    return f"above data.max_prompt_tokens = {limit}"


def name(example: Example) -> str:
    """How a row is called: its file and line, and its id where the data give one."""
    if not example.source or example.source == example.id:
        return example.id
    return f"{example.source} ({example.id})"
