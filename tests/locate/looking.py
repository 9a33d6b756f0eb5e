"""A toy that looks at a grid of visual tokens, and backends whose answers and attention are
planted."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
from PIL import Image

from opd.locate import LOCATORS, Looker, locate
from opd.progress import Quiet
from opd.testing.toy import STOP, ToyBackend, ToyEncoder
from opd.types import Completion, Example, VisualTokens
from opd.views.usable import Skipped
from opd.views.view import ViewOptions

SIDE = 8
"""Visual tokens in a row and a column of an image."""


class GridEncoder(ToyEncoder):
    """As the toy's, with SIDE x SIDE visual tokens for each image, which `decode` answers with
    `said`."""

    said = ""

    def encode(self, images, question, policy="student"):
        prompt = super().encode(images, question, policy)
        tokens = np.concatenate(
            [np.ones(len(images) * SIDE**2, np.int32), prompt.tokens[len(images) :]]
        )
        row, column = np.divmod(np.arange(SIDE**2), SIDE)
        cells = np.stack([column, row, column + 1, row + 1], 1) / SIDE
        boxes = [cells * (image.size * 2) for image in images]
        return replace(
            prompt,
            tokens=tokens,
            positions=np.arange(len(tokens), dtype=np.int32)[None],
            visual=VisualTokens(
                np.arange(len(images) * SIDE**2, dtype=np.int32),
                np.repeat(np.arange(len(images), dtype=np.int32), SIDE**2),
                np.concatenate([np.zeros((0, 4)), *boxes]).astype(np.float32),
            ),
        )

    def decode(self, tokens):
        return self.said


class SeesRed(ToyBackend):
    """Attends everywhere alike, but for a sink in the first token, and for the places of `look`:
    (image, box, weight) by the number of the question's tokens. It answers with four tokens, of
    which one looks, and is the more certain the redder the image is."""

    look: ClassVar[dict] = {}

    def attend(self, prompts, completions, policy="student"):
        arrays = []
        for prompt, members in zip(prompts, completions, strict=True):
            boxes, count = prompt.visual.boxes, len(prompt.visual.index)
            weights = np.full((2, len(members[0]), count), 0.5 / count, np.float32)
            weights[..., 0] += 0.3
            for image, (x0, y0, x1, y1), more in self.look.get(len(prompt.tokens) - count, ()):
                middle = (boxes[:, :2] + boxes[:, 2:]) / 2
                inside = ((middle > (x0, y0)) & (middle < (x1, y1))).all(1)
                weights[1, 1, inside & (prompt.visual.image == image)] += more
            arrays.append([weights])
        return arrays

    def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
        assert sampling.temperature == 0
        assert policy == "student"
        rows = []
        for prompt in prompts:
            red = float(prompt.images["pixel_values"][:, 0].mean().clip(0, 1))
            logprobs = np.full(4, np.log(0.1 + 0.9 * red), np.float32)
            rows.append([Completion(np.array([5, 6, 7, STOP], np.int32), logprobs, True)])
        return rows


def looker(backend=None, encoder=None, config=None, view=None):
    """What locators get, without margins around crops unless `view` says so."""
    return Looker(
        "toy",
        config or {"model_type": "qwen3_vl", "vision_config": {}},
        backend or SeesRed(),
        encoder or GridEncoder(),
        view or ViewOptions(margin=0),
        max_tokens=8,
        limit=4096,
        sample_tokens=10_000,
        microbatch_tokens=1_000,
    )


def picture(box=None, size=(160, 80)):
    """A black picture with a red box."""
    image = Image.new("RGB", size)
    if box:
        image.paste((255, 0, 0), box)
    return image


def example(*images, question="where", name="a"):
    return Example(name, images, question)


def located(by, given, examples):
    """Everything that is found, and what was skipped."""
    skipped, found = Skipped(Quiet()), []
    for part in locate(LOCATORS[by], given, examples, skipped):
        found += [one for _, one in part]
    return found, skipped
