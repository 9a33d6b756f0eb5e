"""One step: its lengths, its micro-batches, and the work of its stages.

A group is a prompt with its completions, which share its pass. A prompt's last token runs with the
completions, whose first token it predicts. An operation is a multiplication or an addition: 2 for
each weight and row, and 4 for each pair of rows that attend and each number of their heads. Bytes
that pass over memory between products are rough.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from opd.models.shape import Shape
from opd.planner import Footprint, Rows
from opd.types import ModelOptions

# Passes over the bytes that a backward holds: written and read twice in the forward; read again in
# the backward, where their gradient is written, added to and read. Passes over logits, trained on
# or drawn from; passes over trained parameters in the optimizer's step and where the teacher moves.
FORWARD, BACKWARD, HEAD, DRAW, OPTIMIZER, AVERAGE = 3, 5, 20, 10, 24, 3

Pixels: TypeAlias = tuple[int, int]
"""Width and height of an image."""


class View(NamedTuple):
    """The image of `size` that a policy sees in `pieces`, and its prompt of `tokens`: `visual` mark
    the image, and `text` would be there without it. `patches` of the image, and `pairs` of them
    that attend to each other, summed over all layers of the vision tower."""

    patches: int
    pairs: int
    visual: int
    tokens: int
    pieces: int = 1
    size: Pixels = (0, 0)
    text: int = 0

    @property
    def before(self) -> int:
        """Tokens that run as the prompt: all but the last."""
        return self.tokens - 1


@dataclass
class Work:
    """A step: `prompts` groups of `completions` completions of `tokens` tokens each.

    `budget`, `sample_budget`: padded tokens of a micro-batch that is differentiated, or sampled.
    `rows` of the data differ; 0: no more than the step's own.
    """

    prompts: int
    completions: int
    tokens: int
    student: View
    teacher: View
    budget: int
    sample_budget: int = 0
    rows: int = 0

    def __post_init__(self) -> None:
        self.longest = max(self.student.tokens, self.teacher.tokens)
        # Padded tokens of one group where it is differentiated, and where it is sampled.
        self.group = self.longest + self.completions * self.tokens
        self.sample = self.student.tokens + self.completions * self.tokens
        # Micro-batches, and groups of each; a group above the budget is alone.
        self.together = min(self.prompts, max(1, self.budget // self.group))
        self.calls = ceil(self.prompts / self.together)
        # Completions of a group that run at a time; 0: all (`opd.method.microbatch`).
        few = max(1, (self.budget - self.longest) // self.tokens)
        self.split = few if self.together == 1 and few < self.completions else 0
        # Groups that are sampled together.
        self.sampled = min(self.prompts, max(1, self.sample_budget // self.sample))

    def lengths(self, groups: int, view: View, completions: int) -> tuple[Rows, Rows, Rows]:
        """Patches, prompts and completions of so many groups, with so many completions each."""
        patches = Rows("patches", groups * view.pieces, view.patches // view.pieces)
        new = Rows("completions", groups * completions, self.tokens, view.before)
        return patches, Rows("prompts", groups, view.before), new

    def trained(self) -> tuple[Rows, Rows, Rows]:
        """Rows of a micro-batch of which the student gets a gradient."""
        return self.lengths(self.together, self.student, self.split or self.completions)


@dataclass
class Step:
    """`work` for a model on a backend with a `rough` footprint, which keeps at most `features`
    bytes of a frozen tower's features. If `full`, all weights get gradients, else adapters; the
    `trained` parameters are counted."""

    shape: Shape
    options: ModelOptions
    work: Work
    rough: Footprint
    features: float

    def __post_init__(self) -> None:
        self.full, self.by_part = self.options.adapters is None, self.shape.trained(self.options)
        self.trained = sum(self.by_part.values())


class Stage(NamedTuple):
    """A stage of a step: `operations` at the speed of products, which read `moved` bytes meanwhile;
    `passed` bytes of elementwise work take time of their own."""

    operations: float
    moved: float
    passed: float


def stages(step: Step, recompute: bool) -> dict[str, Stage]:
    """Every stage of a step. `recompute`: the backward recomputes layers."""
    shape, options, work, count = step.shape, step.options, step.work, step.trained
    forward, backward, again = _costs(step, work.student)
    # If all features of a frozen tower fit, it runs once for an image.
    visual = work.prompts * (work.student.visual + work.teacher.visual)
    looks = options.tunes_features or visual * shape.feature > step.features
    differentiated = np.array([options.tunes_features, True, True])
    rows, table = work.completions * work.tokens, prod(shape.table)
    head, logits = 2.0 * rows * table, 4.0 * rows * shape.table[0]
    # Adapters; the gradients of their inputs and of their weights are as many operations each.
    adapted = 0 if step.full else step.by_part["language"]
    low_rank = np.array([2.0 * adapted * (work.student.before + rows), 0.0])
    group = {
        "rollout prefill": forward[1] + forward[0],
        "rollout decode": forward[2] + [head, DRAW * logits],
        "teacher forward": _costs(step, work.teacher)[0].sum(axis=0),
        "student forward": forward[1] + forward[2] + forward[0] * looks + low_rank,
        "student backward": differentiated @ backward + low_rank * 2,
        "recomputation": (differentiated @ again + low_rank) * recompute,
        # Logits of both policies, and the gradients of hidden states and of a trained head.
        "head and divergence": np.array([(3 + step.full) * head, HEAD * logits]),
    }
    # A token step reads weights once for all that is sampled together, keys and values of a prompt
    # once for its completions, and on average half of a completion's own.
    weights = ceil(work.prompts / work.sampled) * (shape.products + table)
    cache = shape.cache(work.student.before, options.item)
    cache += work.completions * shape.cache(work.tokens // 2, options.item)
    moved = {"rollout decode": work.tokens * (options.item * weights + work.prompts * cache)}
    costs = {name: (cost * work.prompts).tolist() for name, cost in group.items()}
    costs["optimizer"] = [15.0 * count, 4.0 * OPTIMIZER * count]
    costs["teacher's average"] = [3.0 * count, 4.0 * AVERAGE * count]
    return {name: Stage(ops, moved.get(name, 0.0), passed) for name, (ops, passed) in costs.items()}


def _costs(step: Step, view: View) -> NDArray[np.float64]:
    """Operations and passed bytes [2] of an image, its prompt and its completions [3]: of their
    forward, of its backward, and of the part of the forward that the backward recomputes if it
    recomputes layers, which is all but the last product of each [3, 3, 2]."""
    shape, work, costs = step.shape, step.work, []
    for rows in work.lengths(1, view, work.completions):
        products = last = mixing = embed = blocks = 0.0
        if rows.kind == "prompts" and step.rough.image_blocks:
            # Tokens of an image see each other in both directions, not only those before them.
            each = view.visual // view.pieces
            blocks = view.pieces * each * (each - 1) / 2
        for layer in shape.layers(rows):
            mixing += rows.total * 6.0 * layer.state
            if rows.kind == "prompts" and layer is shape.text[-1]:
                # Of a prompt the last layer computes only what a cache holds.
                products += 2.0 * rows.total * layer.cached
                continue
            products += 2.0 * rows.total * layer.products
            last += 2.0 * rows.total * layer.last
            reach = layer.window or rows.before + rows.length
            free = max(0, min(rows.length, reach - rows.before))
            pairs = free * (rows.before + (free + 1) / 2) + (rows.length - free) * reach
            mixing += rows.count * 4.0 * layer.query * (pairs + blocks)
        if rows.kind == "patches":
            # Frames of a still image are alike, so one stands for all that a convolution takes.
            kernels = [size for size in shape.part("vision").values() if len(size) > 3]
            weights = sum(prod(size) // (size[2] if len(size) == 5 else 1) for size in kernels)
            project = sum(prod(one) for one in shape.part("projector").values() if len(one) == 2)
            embed = 2.0 * rows.total * weights  # patches get no gradient
            beside = embed + 2.0 * view.visual * project
            products, last = products + beside, last + beside
            mixing = 4.0 * shape.tower[0].width * view.pairs
        held, forward = shape.held([rows], step.rough.layer), products + mixing
        backward = products * (1 + step.full) + 2 * mixing - embed
        passed = FORWARD * held, BACKWARD * held, FORWARD * held
        costs.append(list(zip((forward, backward, forward - last), passed, strict=True)))
    return np.array(costs).swapaxes(0, 1)
