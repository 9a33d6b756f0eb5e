"""Locates the evidence where the answer's tokens look, for the question against a neutral one.

Source: relative attention of ViCrop (arXiv 2502.17422), "MLLMs Know Where to Look". There the last
prompt token of one chosen layer is read; here all tokens of the answer and all layers, since
without labels no layer can be chosen, and the token that holds the answer is the one that looks.

Legend: L layers of attention, T tokens of an answer, S visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd.errors import no_attention
from opd.locate.locator import NOTHING, Located, Looker, picture_sizes
from opd.locate.windows import Map, Window, best_window, to_map
from opd.method.microbatch import microbatches
from opd.types import Completion, Example, FloatArray, Prompt
from opd.views.usable import encode_full

NEUTRAL = "Write a general description of the image."
"""The question that any picture can be asked, as in ViCrop: what looks alike under it does not
belong to the example's own question, such as attention sinks."""

FLOOR = 1.0
"""Added to both attentions, as a share of the mean neutral one: a quotient of two small attentions
is noise. On the embedded task 0.001 holds less of the evidence, 3 as much."""


class Attention:
    """Relative attention. The confidence is the share of the excess attention in the box, minus the
    box's share of the picture: 0 where attention is spread evenly, near 1 where all of it lies in a
    small box."""

    name = "attention"
    rows = 16

    def check(self, looker: Looker) -> None:
        """Raises BackendError if the backend cannot read this model's attention."""
        if not looker.backend.attends:
            raise no_attention(looker.name)

    def prompts(self, looker: Looker, example: Example) -> list[Prompt]:
        """The full image with the question, and with the neutral one."""
        neutral = replace(example, question=NEUTRAL, choices=())
        return [
            encode_full(looker.encoder, example, looker.limit),
            encode_full(looker.encoder, neutral),
        ]

    def locate(
        self, looker: Looker, examples: Sequence[Example], prompts: Sequence[Sequence[Prompt]]
    ) -> list[Located]:
        """The best window of every example's relative attention."""
        flat = [prompt for pair in prompts for prompt in pair]
        answers = looker.answers(flat)
        looks = _attention(looker, flat, answers)
        return [
            _located(prompt, relative(asked, neutral))
            for (prompt, _), asked, neutral in zip(prompts, looks[::2], looks[1::2], strict=True)
        ]


def relative(asked: FloatArray, neutral: FloatArray) -> Map:
    """Relative attention [S]: the largest of an answer's rows in `asked` [L, T, S] over the mean of
    the rows in `neutral` [L, T', S], averaged over layers.

    The largest, because one token of an answer often names what was found, and the others are form.
    """
    usual = neutral.mean(1, dtype=np.float64)
    floor = FLOOR * usual.mean(1, keepdims=True) + np.finfo(np.float32).tiny
    return np.asarray(((asked.max(1) + floor) / (usual + floor)).mean(0))


def _attention(
    looker: Looker, prompts: Sequence[Prompt], answers: Sequence[Completion]
) -> list[FloatArray]:
    """The attention [L, T, S] of each answer, in micro-batches."""
    costs = [(len(prompt), len(one)) for prompt, one in zip(prompts, answers, strict=True)]
    found: dict[int, FloatArray] = {}
    for part in microbatches(costs, 1, looker.microbatch_tokens):
        together = [prompts[place] for place in part]
        for place, (one,) in zip(
            part, looker.backend.attend(together, [[answers[place]] for place in part]), strict=True
        ):
            found[place] = one
    return [found[place] for place in range(len(prompts))]


def _located(prompt: Prompt, values: Map) -> Located:
    """The best window over all images of a prompt, from relative attention [S]."""
    windows: list[Window] = []
    for image, size in enumerate(picture_sizes(prompt)):
        chosen = prompt.visual.image == image
        if chosen.any():
            cells = to_map(prompt.visual.boxes[chosen], values[chosen], size)
            window = best_window(cells, size, image)
            windows += [window] if window else []
    if not windows:
        return NOTHING
    best = max(windows, key=lambda window: window.excess)
    return Located((best.box,), max(0.0, best.inside - best.area))
