"""An example's question as each policy is asked it: with the options of a choice, and with a marker
for each image.

The options are part of the question: student and teacher are asked the same.
"""

from __future__ import annotations

from opd.data.choices import with_choices
from opd.types import IMAGE_MARKER, Example
from opd.views.images import views_per_image
from opd.views.view import ViewOptions


def student_question(example: Example) -> str:
    """The question, with the options where it does not hold them."""
    return with_choices(example.question, example.choices)


def teacher_question(example: Example, options: ViewOptions) -> str:
    """The same for the teacher; a marker is repeated for all views of its image, so that they stand
    together in its place."""
    question = example.question if example.teacher_question is None else example.teacher_question
    first, *rest = with_choices(question, example.choices).split(IMAGE_MARKER)
    # All images that have no marker follow the last one, so it is repeated by the encoder.
    counts = [*views_per_image(example, options), *(1 for _ in rest)]
    return first + "".join(
        IMAGE_MARKER * (count if number < len(rest) else 1) + part
        for number, (count, part) in enumerate(zip(counts, rest, strict=False), 1)
    )
