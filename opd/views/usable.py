"""Encodes a row for both policies, or says why the row cannot be used.

Training and measuring both encode rows here, so that they skip, count and name the same rows.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from opd.data.images import image_size
from opd.errors import DataError, OpdError, one_line, plural
from opd.progress import Progress
from opd.types import MAX_PIXELS, Encoder, Example, Prompt, SizedEncoder
from opd.views.images import (
    student_images,
    student_pieces,
    teacher_images,
    teacher_sizes,
    views_per_image,
)
from opd.views.questions import student_question, teacher_question
from opd.views.view import ViewOptions

TOLD = 5
"""Number of skipped rows that are reported one by one; further rows are only counted."""


class Unusable(DataError):
    """A row cannot be used; rows are counted by its `kind`."""


class Skipped:
    """Collects the rows that could not be used: `reasons` and `kinds` by the row's name. Tells
    `progress` about the first TOLD rows.

    Safe for threads, since rows are prefetched on another thread.
    """

    def __init__(self, progress: Progress, earlier: Iterable[Mapping[str, str]] = ()) -> None:
        """`earlier`: the `records` of an earlier part of the same run, which are not reported a
        second time."""
        self.reasons: dict[str, str] = {}
        self.kinds: dict[str, str] = {}
        self._progress = progress
        self._handed = 0
        self._lock = threading.Lock()
        for row in earlier:
            self.reasons[row["row"]], self.kinds[row["row"]] = row["reason"], row["kind"]
            self._handed += 1

    def add(self, example: Example | str, error: Unusable) -> None:
        """Counts a row, given by its example or name, and reports it if it is new and among the
        first TOLD."""
        row = example if isinstance(example, str) else name(example)
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
        """A record of every row, with "row", "reason" and "kind", in the order of `add`."""
        with self._lock:
            return [
                {"row": row, "reason": reason, "kind": self.kinds[row]}
                for row, reason in self.reasons.items()
            ]

    def new(self) -> list[dict[str, str]]:
        """The `records` since the last call."""
        records = self.records()[self._handed :]
        self._handed += len(records)
        return records

    def why(self) -> str:
        """The kinds of reasons in words, as in `reasons`."""
        return reasons(row["kind"] for row in self.records())


def reasons(kinds: Iterable[str]) -> str:
    """Kinds of reasons in words, the most frequent first, each with the number of rows."""
    return ", ".join(
        f"{plural(count, 'row')}: {kind}" for kind, count in Counter(kinds).most_common()
    )


def encode_student(encoder: Encoder, example: Example, view: ViewOptions | None = None) -> Prompt:
    """The student's prompt: the full images and the question; with `view`, the images as the
    student sees them in training on it. Raises DataError."""
    return encoder.encode(student_images(example, view), student_question(example))


def encode_teacher(encoder: Encoder, example: Example, view: ViewOptions) -> Prompt:
    """The teacher's prompt: the images of `view`, and the example's teacher_question or question.
    Raises DataError."""
    # Some encoders say their largest image size; enlarging a crop above it would be useless.
    bound = getattr(encoder, "max_pixels", None)
    images = teacher_images(example, view, bound("teacher") if bound else MAX_PIXELS)
    return encoder.encode(images, teacher_question(example, view), "teacher")


def encode(
    encoder: Encoder, example: Example, view: ViewOptions, limit: int | None = None
) -> tuple[Prompt, Prompt]:
    """The student's and the teacher's prompt of a row in training, each of at most `limit` tokens.

    Raises Unusable for a fault of this row, and other errors of `opd.errors` for faults that
    concern every row.
    """
    _check_views(example, view, limit)
    with _guarded(example):
        prompts = encode_student(encoder, example, view), encode_teacher(encoder, example, view)
    _check_length(prompts, limit)
    return prompts


def encode_full(
    encoder: Encoder,
    example: Example,
    limit: int | None = None,
    view: ViewOptions | None = None,
) -> Prompt:
    """The prompt of the full images, as users give them to the model; with `view`, of the images as
    the student sees them in training on it. Raises as `encode` does."""
    with _guarded(example):
        prompt = encode_student(encoder, example, view)
    _check_length([prompt], limit)
    return prompt


def encode_view(
    encoder: Encoder, example: Example, view: ViewOptions, limit: int | None = None
) -> Prompt:
    """The teacher's prompt of a row. Raises as `encode` does."""
    _check_views(example, view, limit)
    with _guarded(example):
        prompt = encode_teacher(encoder, example, view)
    _check_length([prompt], limit)
    return prompt


def lengths(
    encoder: Encoder,
    example: Example,
    view: ViewOptions,
    size_of: Callable[..., tuple[int, int]] = image_size,
) -> tuple[int, int]:
    """Number of tokens in the student's and the teacher's prompt of a row in training. Raises as
    `encode` does.

    Images are not decoded if the encoder is a SizedEncoder; `size_of` then gives their sizes.
    """
    if not isinstance(encoder, SizedEncoder):
        student, teacher = encode(encoder, example, view)
        return len(student), len(teacher)
    with _guarded(example):
        sizes = [size_of(source, example.max_image_pixels) for source in example.images]
        full = [piece.size for piece in student_pieces(example, view, sizes)]
        crop = teacher_sizes(example, view, encoder.max_pixels("teacher"), size_of)
        return (
            encoder.length(full, student_question(example)),
            encoder.length(crop, teacher_question(example, view), "teacher"),
        )


@contextmanager
def _guarded(example: Example) -> Iterator[None]:
    """Turns errors of one row into Unusable; MemoryError is passed on, since it would concern every
    row."""
    for text in (example.question, example.teacher_question or "", *example.choices):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise Unusable("the question holds half of a surrogate pair, which is no character")
    try:
        yield
    except DataError as error:
        raise Unusable(str(error)) from error
    except (OpdError, MemoryError):
        raise
    except Exception as error:  # image and text libraries raise errors of many classes
        raise Unusable(
            f"the row cannot be encoded: {one_line(error)}", "the row cannot be encoded"
        ) from error


def _check_views(example: Example, view: ViewOptions, limit: int | None) -> None:
    """Raises Unusable for a row of more views than `limit`: every view takes at least one token, so
    cutting can be skipped."""
    views = sum(views_per_image(example, view))
    if limit and views > limit:
        raise Unusable(f"{views:,} views, {above(limit)}", above(limit))


def _check_length(prompts: Sequence[Prompt], limit: int | None) -> None:
    """Raises Unusable if a prompt has more than `limit` tokens."""
    longest = max(map(len, prompts))
    if limit and longest > limit:
        raise Unusable(*too_long(longest, limit))


def too_long(tokens: int, limit: int) -> tuple[str, str]:
    """Reason and kind for a row whose longer prompt has `tokens` tokens."""
    return f"prompt of {plural(tokens, 'token')}, {above(limit)}", above(limit)


def above(limit: int) -> str:
    """The kind of reason for rows with a prompt of more than `limit` tokens."""
    return f"above data.max_prompt_tokens = {limit}"


def name(example: Example) -> str:
    """The name of a row in messages: file and line, and the id if the data give one."""
    if not example.source or example.source == example.id:
        return example.id
    return f"{example.source} ({example.id})"
