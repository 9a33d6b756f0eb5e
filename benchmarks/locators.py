"""How often does a located box hold the evidence? Every locator on scenes of the embedded model.

    python -m benchmarks.locators [--rows 400] [--tiles 100] [--backend mlx] [--json] [--no-wall]

For each method, over scenes on which no choice was made: the share of rows with a box (`located`),
and of these the share whose box holds the whole evidence (`held`), whose crop does, with the margin
of the preset `tiny` (`crop_held`), the mean share of the evidence in the box (`covered`) and the
mean share of the picture that the box takes (`area`); the model's accuracy on that crop, which is
what a teacher would teach from it; and seconds a row on one thread. `sure` and `unsure` are `held`
in the halves of higher and lower confidence. Below each method stands its control, boxes of the
same sizes at random places; true boxes are the last row.

`why` shows why the certainty of answers does not find the evidence here: the median probability per
token of the model's own answer on the crop of the evidence, on the crop of another tile of the same
scene, and the share of scenes in which the first is the higher one. The benchmark writes
results/locators.json.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import measuring
from opd import registry
from opd.locate import LOCATORS, Looker, locate
from opd.locate.locator import certainty
from opd.measure.gap import greedy_answers
from opd.models.files import read_json
from opd.progress import Quiet
from opd.prompts.processor import open_encoder
from opd.run.recipe import load
from opd.tiny import MODEL, Scenes
from opd.tiny.task import TILE
from opd.types import Box, Example, ModelOptions
from opd.views.crop import region
from opd.views.usable import Skipped, encode_view

RESULTS = Path(__file__).parent / "results/locators.json"
FIRST = 1000
"""The first scene: settings of locators were chosen on earlier ones."""

SIDE = 128
"""Width and height of a scene in pixels."""


def main() -> None:
    parser = measuring.arguments(__doc__)
    parser.add_argument("--rows", type=int, default=400, help="scenes of each method")
    parser.add_argument("--tiles", type=int, default=100, help="scenes of the method tiles")
    parser.add_argument("--backend", choices=("cpu", "mlx"), default="cpu")
    options = parser.parse_args()
    looker = tiny(options.backend)
    rows: list[measuring.Row] = []
    count = 8 if options.quick else options.rows
    scenes = fresh(count)
    for by in LOCATORS:
        some = scenes[: options.tiles] if by == "tiles" else scenes
        rows += compared(looker, by, some, options)
    true = [example.boxes for example in scenes]
    rows.append({"boxes": "true boxes", "rows": count, **scored(looker, scenes, true)})
    why = certainties(looker, count)
    result = measuring.report(options, "locators", rows, why=why)
    if not options.quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def fresh(count: int) -> Sequence[Example]:
    """Scenes on which no choice was made."""
    return Scenes("fresh", FIRST + count)[FIRST:]


def tiny(backend: str) -> Looker:
    """The embedded model as a looker, with the preset `tiny`."""
    recipe = load("tiny")
    return Looker(
        "tiny",
        read_json(MODEL / "config.json"),
        registry.load(backend, ModelOptions(MODEL)),
        open_encoder(MODEL),
        recipe.view,
        recipe.measure.max_tokens,
        recipe.data.max_prompt_tokens,
        recipe.rollout.sample_tokens,
        recipe.rollout.microbatch_tokens,
    )


def compared(
    looker: Looker, by: str, scenes: Sequence[Example], options: Any
) -> list[measuring.Row]:
    """The rows of a method and of its control."""
    began, found = time.perf_counter(), []
    for part in locate(LOCATORS[by], looker, scenes, Skipped(Quiet())):
        found += part
    seconds = (time.perf_counter() - began) / len(scenes)
    examples = [example for example, one in found if one.boxes]
    boxes = [one.boxes for _, one in found if one.boxes]
    row: measuring.Row = {"boxes": by, "rows": len(scenes), "located": len(boxes) / len(scenes)}
    if not options.no_wall:
        row["seconds_per_row"] = seconds
    if not boxes:
        return [row]
    confidence = np.array([one.confidence for _, one in found if one.boxes])
    sure = confidence >= np.median(confidence)
    held = np.array(
        [holds(one[0], example.boxes[0]) for one, example in zip(boxes, examples, strict=True)]
    )
    row |= scored(looker, examples, boxes)
    row |= {"confidence": float(np.median(confidence)), "sure": held[sure].mean()}
    row["unsure"] = held[~sure].mean() if (~sure).any() else float("nan")
    control = scored(looker, examples, [moved(one) for one in boxes])
    return [row, {"boxes": "  at random", "rows": len(scenes), **control}]


def scored(
    looker: Looker, examples: Sequence[Example], boxes: Sequence[tuple[Box, ...]]
) -> measuring.Row:
    """How well one box an example fits the evidence, and the accuracy on its crop."""
    pairs = [(one[0], example.boxes[0]) for one, example in zip(boxes, examples, strict=True)]
    view = looker.view
    crops = [Box(*region(box, SIDE, SIDE, view.margin, view.margin_fraction)) for box, _ in pairs]
    answered = greedy_answers(
        looker.backend,
        looker.encoder,
        [replace(example, boxes=one) for example, one in zip(examples, boxes, strict=True)],
        view,
        looker.max_tokens,
        looker.sample_tokens,
    )
    return {
        "held": mean(holds(*pair) for pair in pairs),
        "crop_held": mean(holds(crop, true) for crop, (_, true) in zip(crops, pairs, strict=True)),
        "covered": mean(shared(*pair) / TILE**2 for pair in pairs),
        "area": mean(shared(box, box) / SIDE**2 for box, _ in pairs),
        "crop_accuracy": mean(bool(one.crop_right) for one in answered),
    }


def certainties(looker: Looker, count: int) -> dict[str, Any]:
    """The certainty of answers on the evidence, and on another tile."""
    prompts, scenes = [], Scenes("fresh", FIRST + count)
    for number in range(FIRST, FIRST + count):
        example, scene = scenes[number], scenes.scene(number)
        other = next(tile for tile in scene.tiles if tile != scene.target)
        for box in (scene.target.box, other.box):
            crop = replace(example, boxes=(box,))
            prompts.append(encode_view(looker.encoder, crop, looker.view))
    sure = np.array([certainty(answer) for answer in looker.answers(prompts)]).reshape(-1, 2)
    return {
        "on the evidence": float(np.median(sure[:, 0])),
        "on another tile": float(np.median(sure[:, 1])),
        "evidence is higher": float((sure[:, 0] > sure[:, 1]).mean()),
    }


def moved(boxes: tuple[Box, ...]) -> tuple[Box, ...]:
    """A box of the same size at a random place."""
    (box, *_) = boxes
    across, down = box.x1 - box.x0, box.y1 - box.y0
    x, y = RANDOM.uniform(0, SIDE - across), RANDOM.uniform(0, SIDE - down)
    return (Box(x, y, x + across, y + down),)


RANDOM = np.random.default_rng(0)


def shared(a: Box, b: Box) -> float:
    """Pixels that two boxes share."""
    across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, across) * max(0.0, down)


def holds(outer: Box, inner: Box) -> bool:
    """Whether a box holds the whole of another one."""
    return shared(outer, inner) >= shared(inner, inner) - 1e-6


def mean(values: Any) -> float:
    return float(np.mean(list(values)))


if __name__ == "__main__":
    main()
