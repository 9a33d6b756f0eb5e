"""Gathers what a sheet shows of a row: the pictures that each policy sees, made as in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from PIL.Image import Image

from opd.data.images import image_size
from opd.errors import DataError
from opd.types import MAX_PIXELS, Encoder, Example, SizedEncoder
from opd.views.images import student_images, student_pieces, teacher_images
from opd.views.piece import Piece, Size
from opd.views.questions import student_question, teacher_question
from opd.views.usable import lengths
from opd.views.view import ViewOptions

Corners: TypeAlias = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels of the picture that is shown."""


@dataclass(frozen=True)
class Shown:
    """A picture that a policy sees, RGB, with the evidence `boxes` in it. `title` says who sees
    it."""

    title: str
    image: Image
    boxes: tuple[Corners, ...] = ()


@dataclass(frozen=True)
class Card:
    """What a sheet shows of a row.

    `question` is what the student is asked, and `teacher_question` what the teacher is, if that
    differs. `tokens`: those of both prompts, if a model is known. `fault`: why training cannot use
    the row; empty if it can.
    """

    id: str
    source: str
    student: tuple[Shown, ...]
    teacher: tuple[Shown, ...]
    question: str
    teacher_question: str = ""
    answer: str = ""
    tokens: tuple[int, int] | None = None
    fault: str = ""


def cards(
    examples: Iterable[Example], view: ViewOptions, encoder: Encoder | None = None
) -> Iterator[Card]:
    """Yields the card of each example. With an encoder, crops are not enlarged above its bound, and
    tokens are counted."""
    for example in examples:
        yield card(example, view, encoder)


def card(example: Example, view: ViewOptions, encoder: Encoder | None = None) -> Card:
    """The card of an example; a row that training cannot use has a card with the fault."""
    student: tuple[Shown, ...] = ()
    teacher: tuple[Shown, ...] = ()
    tokens, asked, fault = None, "", ""
    bound = encoder.max_pixels("teacher") if isinstance(encoder, SizedEncoder) else MAX_PIXELS
    try:
        student = _student(example, view)
        seen = teacher_images(example, view, bound)
        teacher = tuple(
            Shown(_title("teacher", place, len(seen)), image) for place, image in enumerate(seen)
        )
        asked = teacher_question(example, view)
        tokens = lengths(encoder, example, view) if encoder else None
    except DataError as error:
        fault = str(error)
    question = student_question(example)
    answers = [example.answer] if isinstance(example.answer, str) else [*(example.answer or ())]
    return Card(
        example.id,
        example.source if example.source != example.id else "",
        student,
        teacher,
        question,
        asked if asked != question else "",
        " or ".join(answers),
        tokens,
        fault,
    )


def _student(example: Example, view: ViewOptions) -> tuple[Shown, ...]:
    """The pictures that the student sees in training, with the boxes."""
    images = student_images(example, view)
    sizes = [image_size(source, example.max_image_pixels) for source in example.images]
    pieces = student_pieces(example, view, sizes)
    shown = []
    for place, (image, piece) in enumerate(zip(images, pieces, strict=True)):
        boxes = tuple(
            _placed((box.x0, box.y0, box.x1, box.y1), piece)
            for box in example.boxes
            if box.image == place
        )
        shown.append(Shown(_title("student", place, len(images)), image, boxes))
    return tuple(shown)


def _placed(corners: Corners, piece: Piece) -> Corners:
    """A box of the whole image, in pixels of a piece of it."""
    left, top, right, bottom = piece.region
    across, down = piece.size[0] / (right - left), piece.size[1] / (bottom - top)
    x0, y0, x1, y1 = corners
    return (x0 - left) * across, (y0 - top) * down, (x1 - left) * across, (y1 - top) * down


def _title(policy: str, place: int, count: int) -> str:
    return policy if count == 1 else f"{policy}, picture {place + 1} of {count}"


def caption(shown: Shown, factor: float) -> str:
    """A line about a picture that is shown `factor` times as large as it is."""
    width, height = shown.image.size
    size = f"{width:,} x {height:,} pixels"
    if factor == 1:
        return f"{shown.title}: {size}"
    scale = f"{factor:.0f}x" if factor > 1 else f"at {factor:.0%}"
    return f"{shown.title}: {size}, shown {scale}"


def details(card: Card) -> str:
    """A line about tokens; empty if no model is known."""
    if card.tokens is None:
        return ""
    student, teacher = card.tokens
    return f"student {student:,} tokens, teacher {teacher:,} tokens"


def factor_for(size: Size, most: Size, largest: int = 8) -> float:
    """The factor by which a picture of `size` is shown within `most`: a whole number up to
    `largest` for a small picture, so that each of its pixels is a square; below 1 for a large
    one."""
    factor = min(room / side for side, room in zip(size, most, strict=True))
    return float(min(largest, int(factor))) if factor >= 1 else factor


def scaled(size: Size, factor: float) -> Size:
    """`size` times `factor`, at least one pixel on each side."""
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def printable(text: str, keep: str = "\n") -> str:
    """A text with escapes for characters that are invisible or steer the text's direction, but for
    those in `keep`."""
    return "".join(
        letter if letter in keep or letter.isprintable() else ascii(letter)[1:-1]
        for letter in text.replace("\r\n", "\n").replace("\t", "    ")
    )


def sequence(card: Card) -> Sequence[Shown]:
    """The pictures of both policies, the student's first."""
    return [*card.student, *card.teacher]
