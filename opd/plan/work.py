"""The work of one step: lengths, and operations and bytes moved by stage.

An operation is a multiplication or an addition: 2 for each weight and row, and 4 for each pair of
rows that attend and each number of their heads. What passes over memory between products is rough.

Legend: n completions of a prompt. A group is a prompt with its n completions, and what they share
is computed once; a prompt's last token runs with the completions, whose first token it predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from opd.plan.shape import Shape, item_of, sees
from opd.planner import Footprint, Lengths
from opd.types import ModelOptions

FORWARD, BACKWARD = 3, 5
"""Passes over what a backward holds: written, read twice; read, its gradient written, added,
read."""

HEAD, DRAW, OPTIMIZER, AVERAGE = 20, 10, 24, 3
"""Passes over logits that are trained on, or drawn from; over trained parameters in the optimizer's
step, and where the teacher moves."""


class View(NamedTuple):
    """An image as a policy sees it: `patches`, which make `visual` of the prompt's `tokens`, and
    pairs of patches that attend to each other in all layers of the tower together; cut into
    `pieces` for the tower."""

    patches: int
    pairs: int
    visual: int
    tokens: int
    pieces: int = 1

    @property
    def before(self) -> int:
        """Tokens that run as the prompt: all but the last."""
        return self.tokens - 1


@dataclass(frozen=True)
class Work:
    """A step: `prompts` groups of `completions` completions of `tokens` tokens each.

    Micro-batches that are differentiated have `budget` padded tokens, those that are sampled have
    `room`. `rows` of the data differ; 0: no more than the step's own.
    """

    prompts: int
    completions: int
    tokens: int
    student: View
    teacher: View
    budget: int
    room: int = 0
    rows: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longer prompt."""
        return max(self.student.tokens, self.teacher.tokens)

    @property
    def group(self) -> int:
        """Padded tokens of one group where it is differentiated."""
        return self.longest + self.completions * self.tokens

    @property
    def sample(self) -> int:
        """Padded tokens of one group where it is sampled."""
        return self.student.tokens + self.completions * self.tokens

    @property
    def together(self) -> int:
        """Groups of a micro-batch; a group above the budget is alone."""
        return min(self.prompts, max(1, self.budget // self.group))

    @property
    def split(self) -> int:
        """Completions of a group that run at a time; 0: all (`opd.method.microbatch`)."""
        few = max(1, (self.budget - self.longest) // self.tokens)
        return few if self.together == 1 and few < self.completions else 0

    @property
    def count(self) -> int:
        """Completions that run at a time, of all groups of a micro-batch."""
        return self.together * (self.split or self.completions)

    @property
    def calls(self) -> int:
        """Micro-batches of a step."""
        return math.ceil(self.prompts / self.together)

    @property
    def lengths(self) -> Lengths:
        """Rows of a micro-batch that is differentiated."""
        student, few = self.student, self.split or self.completions
        rows = self.together, student.before, few, self.tokens
        return Lengths(*rows, student.pieces, student.patches // student.pieces)

    @property
    def sampled(self) -> int:
        """Groups that are sampled together."""
        return min(self.prompts, max(1, self.room // self.sample))


@dataclass(frozen=True)
class Stage:
    """A stage of a step: `operations` at the speed of products, which read `moved` bytes meanwhile;
    `passed` bytes of elementwise work take time of their own."""

    operations: float
    moved: float = 0.0
    passed: float = 0.0


def stages(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, recompute: bool, room: float
) -> dict[str, Stage]:
    """Every stage of a step; `room` bytes hold the features of a frozen tower, once computed.

    With `recompute`, layers are computed twice.
    """
    n, full, seen = work.completions, options.adapters is None, sees(options)
    new, trained = n * work.tokens, shape.trained(options)
    head, count = 2.0 * math.prod(shape.table), sum(trained.values())
    weights, width = shape.products, shape.tower[0].width
    visual = work.student.visual + work.teacher.visual
    look = seen or work.prompts * visual * shape.feature > room
    a_token, a_new, a_patch = (
        sum(layer.held(row) for layer in layers)
        for layers, row in (
            (shape.layers, rough.prompt),
            (shape.layers, rough.completion),
            (shape.tower, rough.patch),
        )
    )

    def tower(view: View) -> tuple[float, float]:
        products = view.patches * weights["vision"] + view.visual * weights["projector"]
        return 2.0 * products, 4.0 * width * view.pairs

    def prompt(view: View) -> tuple[float, float]:
        # Of the last layer only what is handed to completions is computed.
        products = 2.0 * view.before * (weights["language"] - shape.unhanded)
        return products, _mixing(shape, 0, view.before, handed=1)

    def completed(view: View) -> tuple[float, float]:
        return 2.0 * new * weights["language"], n * _mixing(shape, view.before, work.tokens)

    student, teacher = work.student, work.teacher
    image, read, own = tower(student), prompt(student), completed(student)
    forward = sum(read) + sum(own)
    products = read[0] + own[0] + image[0] * seen
    # Of adapters; the gradients of their inputs and of their weights are as many each.
    low_rank = 0.0 if full else 2.0 * trained["language"] * (student.before + new)
    backward = products * (1 + full) + 2 * (read[1] + own[1] + image[1] * seen + low_rank)
    logits, decoded = 4.0 * shape.table[0] * new, new * a_new
    prompts, patches = student.before * a_token, student.patches * a_patch
    crop = teacher.before * a_token + teacher.patches * a_patch
    # Of each stage of one group: operations, and bytes passed.
    each = {
        "rollout prefill": (sum(read) + sum(image), FORWARD * (prompts + patches)),
        "rollout decode": (sum(own) + new * head, FORWARD * decoded + DRAW * logits),
        "teacher forward": (
            sum(tower(teacher)) + sum(prompt(teacher)) + sum(completed(teacher)),
            FORWARD * (crop + decoded),
        ),
        "student forward": (
            forward + low_rank + sum(image) * look,
            FORWARD * (prompts + decoded + patches * look),
        ),
        "student backward": (backward, BACKWARD * (prompts + decoded + patches * seen)),
        "recomputation": (
            (forward + low_rank + sum(image) * seen) * recompute,
            FORWARD * (prompts + decoded + patches * seen) * recompute,
        ),
        # Logits of both policies, and the gradients of hidden states and of a trained head.
        "head and divergence": ((3 + full) * new * head, HEAD * logits),
    }
    found = {
        name: Stage(work.prompts * operations, passed=work.prompts * passed)
        for name, (operations, passed) in each.items()
    }
    moved = _read(shape, work, item_of(options))
    return found | {
        "rollout decode": replace(found["rollout decode"], moved=moved),
        "optimizer": Stage(15.0 * count, passed=4.0 * OPTIMIZER * count),
        "teacher's average": Stage(3.0 * count, passed=4.0 * AVERAGE * count),
    }


def _read(shape: Shape, work: Work, item: int) -> float:
    """Bytes that token steps read: weights once for all that is sampled together, keys and values.

    Those of a prompt are read once for its completions, and of a completion half on average.
    """
    calls = math.ceil(work.prompts / work.sampled)
    weights = calls * item * (shape.products["language"] + math.prod(shape.table))
    own = work.completions * shape.cache(work.tokens // 2, item)
    return work.tokens * (weights + work.prompts * (shape.cache(work.student.before, item) + own))


def _mixing(shape: Shape, before: int, length: int, handed: int = 0) -> float:
    """Operations of `length` tokens with each other and with `before` tokens, of which each sees
    its window or all, without those of the last `handed` layers; or of states, read, written and
    read."""
    found = 6.0 * shape.states * length
    layers = list(zip(shape.layers, shape.windows, strict=True))
    for layer, window in layers[: len(layers) - handed]:
        reach = window or before + length
        free = max(0, min(length, reach - before))
        found += (
            4.0 * layer.query * (free * before + free * (free + 1) / 2 + (length - free) * reach)
        )
    return found
