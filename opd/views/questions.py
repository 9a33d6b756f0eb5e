"""The question of an example in the prompt of each policy: with the choices, and with a marker for
each image.

Both policies get the choices, so that they answer the same question.
"""

from __future__ import annotations

from opd.data.choices import with_choices
from opd.types import IMAGE_MARKER, Example
from opd.views.images import views_per_image
from opd.views.view import ViewOptions


def student_question(example: Example) -> str:
    """The question, followed by the choices if it does not list them."""
    return with_choices(example.question, example.choices)


def teacher_question(example: Example, options: ViewOptions) -> str:
    """The teacher's question, followed by the choices if it does not list them. The marker of an
    image is repeated for every view of this image."""
    question = example.question if example.teacher_question is None else example.teacher_question
    result, *rest = with_choices(question, example.choices).split(IMAGE_MARKER)
    counts = views_per_image(example, options)
    for number, part in enumerate(rest):
        # The encoder repeats the last marker for all images that are left.
        repeats = number < len(rest) - 1 and number < len(counts)
        result += IMAGE_MARKER * (counts[number] if repeats else 1) + part
    return result
