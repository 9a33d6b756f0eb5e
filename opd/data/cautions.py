"""What may be wrong with a row that can be used: its warnings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from opd.data.answers import chosen
from opd.data.choices import options_in
from opd.data.fields import show
from opd.data.remarks import tells_place
from opd.types import Example

LARGE = 0.5
"""A box above this share of its picture is no small evidence: the crop shows hardly more than the
full picture."""

SMALL = 4
"""A box with a side below this many pixels is hardly evidence that a model can read."""


def cautions(example: Example, sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yields kind and detail of each warning about a row. `sizes`: (width, height) of its
    images."""
    for text in (example.question, example.teacher_question or ""):
        if tells_place(text):
            yield "the question tells the place", show(text)
            break
    for box in example.boxes:
        width, height = sizes[box.image]
        across, down = box.x1 - box.x0, box.y1 - box.y0
        if across * down > LARGE * width * height:
            share = across * down / (width * height)
            yield "a box above half of its picture", f"{share:.0%} of {width} x {height} pixels"
        if min(across, down) < SMALL:
            yield f"a box with a side below {SMALL} pixels", f"{across:g} x {down:g} pixels"
    answers = (example.answer,) if isinstance(example.answer, str) else example.answer or ()
    listed = () if example.choices else options_in(example.question)
    for answer in answers:
        if listed and chosen(answer, listed) is None:
            yield "the answer is no option of the question", f"answer {show(answer)}"
            break
    texts = [" ".join(choice.split()).casefold() for choice in example.choices]
    if len(set(texts)) < len(texts):
        yield "two choices are the same", f"among {len(texts)}"
    if not example.weight:
        yield "the weight is 0", "nothing is learnt from it"
