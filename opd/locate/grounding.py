"""Locates the evidence by asking the model for its box, in the form that its family is trained on.

Sources: the model cards and cookbooks of Qwen2-VL (two corners between box tokens, which decoding
leaves out; 0 to 1000 of width and height), Qwen2.5-VL (`bbox_2d` in pixels of the resized picture),
Qwen3-VL and Qwen3.5 (`bbox_2d`, 0 to 1000).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from opd.data.boxes import Drawn, boxes
from opd.errors import DataError, ModelError
from opd.locate.locator import NOTHING, Located, Looker, certainty, picture_sizes
from opd.types import IMAGE_MARKER, Box, Example, Prompt
from opd.views.piece import Size
from opd.views.usable import encode_full

ANSWER_TOKENS = 128
"""Tokens that a box in JSON with its label needs; Qwen's tokenizers write a token a digit."""

LONGEST = 20_000
"""Characters of an answer that are read."""

JSON = (
    "Locate the part of the image that one has to look at to answer this question: {question}\n"
    'Output its bounding box in JSON, as [{{"bbox_2d": [x1, y1, x2, y2], "label": "..."}}].'
)
PLAIN = (
    "Locate the part of the image that one has to look at to answer this question: {question}\n"
    "Output its bounding box, as (x1,y1),(x2,y2)."
)


@dataclass(frozen=True)
class Form:
    """How a family is asked, `ask` with `{question}` in it, and the `unit` of its boxes."""

    ask: str
    unit: Literal["per-mille", "resized"]


FORMS: Mapping[str, Form] = {
    "qwen2_vl": Form(PLAIN, "per-mille"),
    "qwen2_5_vl": Form(JSON, "resized"),
    "qwen3_vl": Form(JSON, "per-mille"),
    "qwen3_5": Form(JSON, "per-mille"),
}
"""The forms by `model_type` of config.json."""


class Grounding:
    """The box that the model names. The confidence is the model's probability per token of its
    answer, the geometric mean. Each image of an example is asked about alone, and the one with the
    most certain box is taken."""

    name = "grounding"
    rows = 16

    def check(self, looker: Looker) -> None:
        """Raises ModelError if the family's form is not known."""
        _form(looker)

    def prompts(self, looker: Looker, example: Example) -> list[Prompt]:
        """A prompt for each image of the example."""
        asked = example.question.replace(IMAGE_MARKER, " ").strip()
        question = _form(looker).ask.format(question=asked)
        alone = replace(example, question=question, choices=())
        return [
            encode_full(looker.encoder, replace(alone, images=(image,)), looker.limit)
            for image in example.images
        ]

    def locate(
        self, looker: Looker, examples: Sequence[Example], prompts: Sequence[Sequence[Prompt]]
    ) -> list[Located]:
        """The boxes in the answers."""
        flat = [prompt for some in prompts for prompt in some]
        answers = iter(looker.answers(flat, ANSWER_TOKENS))
        form = _form(looker)
        located = []
        for some in prompts:
            best = NOTHING
            for image, prompt in enumerate(some):
                answer = next(answers)
                (size,) = picture_sizes(prompt)
                text = looker.encoder.decode(answer.tokens.tolist())
                resized = _resized(prompt, size, looker.config)
                found = Located(parse(text, form.unit, size, resized, image), certainty(answer))
                if found.boxes and found.confidence > best.confidence:
                    best = found
            located.append(best)
        return located


def parse(
    answer: str,
    unit: Literal["per-mille", "resized"],
    size: Size,
    resized: Size,
    image: int = 0,
) -> tuple[Box, ...]:
    """The boxes in an answer, in pixels of the upright picture of `size` (width, height); none for
    an answer without a box. `resized`: the size to which the image processor resized the picture.

    Read are `"bbox_2d": [x1, y1, x2, y2]`, also in JSON that is cut off, else (x1,y1),(x2,y2), else
    lists of four numbers. As in a data file, a box that is empty or outside of the picture cannot
    be used; it is left out.
    """
    text = answer[:LONGEST]
    found: dict[Box, None] = {}
    groups = next((some for some in (each.findall(text) for each in WRITTEN) if some), [])
    for group in groups:
        row: dict[str, Any] = {"boxes": [[float(number) for number in group]]}
        if unit == "resized":
            row["box_size"] = list(resized)
        try:
            (box,) = boxes(row, [size], Drawn(unit, "upright"))
        except DataError:
            continue
        found[replace(box, image=image)] = None
    return tuple(found)


_NUMBER = r"\s{0,8}(-?\d{1,9}(?:\.\d{0,9})?)\s{0,8}"
_FOUR = ",".join([_NUMBER] * 4)
WRITTEN = [
    re.compile(pattern, re.ASCII)
    for pattern in (
        rf'"bbox(?:_2d)?"\s{{0,8}}:\s{{0,8}}\[{{1,2}}{_FOUR}\]',
        rf"\({_NUMBER},{_NUMBER}\)\s{{0,8}},\s{{0,8}}\({_NUMBER},{_NUMBER}\)",
        rf"\[{_FOUR}\]",
    )
]
"""The ways in which boxes are written, in the order in which they are tried."""


def _form(looker: Looker) -> Form:
    kind = str(looker.config.get("model_type"))
    if kind not in FORMS:
        known = ", ".join(FORMS)
        raise ModelError(
            f"{looker.name}: in which form models of type '{kind}' write a box is not known; known:"
            f" {known}; locate by attention or tiles"
        )
    return FORMS[kind]


def _resized(prompt: Prompt, size: Size, config: Mapping[str, Any]) -> Size:
    """The (width, height) of the one picture of a prompt after the image processor resized it."""
    vision = config.get("vision_config", {})
    side = int(vision.get("patch_size", 14)) * int(vision.get("spatial_merge_size", 2))
    token = prompt.visual.boxes[0]
    columns, rows = size[0] / float(token[2] - token[0]), size[1] / float(token[3] - token[1])
    return round(columns) * side, round(rows) * side
