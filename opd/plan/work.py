"""One step: its lengths, its micro-batches, and the work of its stages.

A group is a prompt with its completions. A prompt's last token runs with the completions, whose
first token it predicts. An operation is a multiplication or an addition: 2 for each weight and row,
and 4 for each pair of rows that attend and each number of their heads. Completions of a prompt
share its pass. Bytes that pass over memory between products are rough.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from math import ceil, prod
from operator import add
from typing import NamedTuple

from opd.models.shape import Shape
from opd.planner import Footprint, Rows
from opd.types import ModelOptions

FORWARD, BACKWARD = 3, 5
"""Passes over the bytes that a backward holds: written and read twice in the forward; read again in
the backward, where their gradient is written, added to and read."""

HEAD, DRAW, OPTIMIZER, AVERAGE = 20, 10, 24, 3
"""Passes over logits that are trained on, and over logits that tokens are drawn from; passes over
trained parameters in the optimizer's step, and where the teacher moves."""


class View(NamedTuple):
    """The image that a policy sees, and its prompt of `tokens`, of which `visual` mark the image.
    `patches` of the image, and `pairs` of them that attend to each other, summed over all layers of
    the vision tower, which sees the image in `pieces`."""

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
    def calls(self) -> int:
        """Micro-batches of a step."""
        return ceil(self.prompts / self.together)

    @property
    def sampled(self) -> int:
        """Groups that are sampled together."""
        return min(self.prompts, max(1, self.sample_budget // self.sample))

    def lengths(self, groups: int, view: View, completions: int) -> tuple[Rows, Rows, Rows]:
        """Patches, prompts and completions of so many groups, with so many completions each."""
        patches = Rows("patches", groups * view.pieces, view.patches // view.pieces)
        new = Rows("completions", groups * completions, self.tokens, view.before)
        return patches, Rows("prompts", groups, view.before), new

    def trained(self) -> tuple[Rows, Rows, Rows]:
        """Rows of a micro-batch of which the student gets a gradient."""
        return self.lengths(self.together, self.student, self.split or self.completions)


@dataclass(frozen=True)
class Stage:
    """A stage of a step: `operations` at the speed of products, which read `moved` bytes meanwhile;
    `passed` bytes of elementwise work take time of their own."""

    operations: float
    moved: float = 0.0
    passed: float = 0.0

    def __add__(self, other: Stage) -> Stage:
        return Stage(*map(add, astuple(self), astuple(other)))

    def __mul__(self, times: float) -> Stage:
        return Stage(*(times * size for size in astuple(self)))


class Passes(NamedTuple):
    """A forward, its backward, and the part of the forward that the backward recomputes if it
    recomputes layers: all but the last product of each, which nothing reads."""

    forward: Stage
    backward: Stage
    recomputed: Stage


def passes(shape: Shape, full: bool, view: View, rows: Rows, rough: Footprint) -> Passes:
    """Passes of `rows`: an image, its prompt without the last token, or completions of the prompt.

    `full`: weights get gradients, else only their inputs do. Patches get none. The last layer
    computes of a prompt only what a cache holds.
    """
    products = last = mixing = embed = blocks = 0.0
    if rows.kind == "prompts" and rough.image_blocks:
        # Tokens of an image see each other in both directions, not only those before them.
        each = view.visual // view.pieces
        blocks = view.pieces * each * (each - 1) / 2
    for layer in shape.layers(rows):
        mixing += rows.total * 6.0 * layer.state
        if rows.kind == "prompts" and layer is shape.text[-1]:
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
        project = sum(prod(size) for size in shape.part("projector").values() if len(size) == 2)
        embed = 2.0 * rows.total * weights
        beside = embed + 2.0 * view.visual * project
        products, last = products + beside, last + beside
        mixing = 4.0 * shape.tower[0].width * view.pairs
    held = shape.held([rows], rough.layer)
    forward = Stage(products + mixing, passed=FORWARD * held)
    backward = Stage(products * (1 + full) + 2 * mixing - embed, passed=BACKWARD * held)
    return Passes(forward, backward, forward + Stage(-last))


def stages(
    shape: Shape,
    options: ModelOptions,
    work: Work,
    rough: Footprint,
    recompute: bool,
    most_features: float,
) -> dict[str, Stage]:
    """Every stage of a step.

    `recompute`: the backward recomputes layers. `most_features`: the most bytes of a frozen tower's
    features that are kept; if all fit, the tower runs once for an image.
    """
    full, trained = options.adapters is None, shape.trained(options)

    def run(view: View) -> list[Passes]:
        groups = work.lengths(1, view, work.completions)
        return [passes(shape, full, view, rows, rough) for rows in groups]

    image, prompt, new = student = run(work.student)
    differentiated = student if options.tunes_features else student[1:]
    visual = work.prompts * (work.student.visual + work.teacher.visual)
    looks = options.tunes_features or visual * shape.feature > most_features
    rows = work.completions * work.tokens
    head, logits = 2.0 * rows * prod(shape.table), 4.0 * rows * shape.table[0]
    # Adapters; the gradients of their inputs and of their weights are as many operations each.
    beside = 0.0 if full else 2.0 * trained["language"] * (work.student.before + rows)
    low_rank, count = Stage(beside), sum(trained.values())
    group = {
        "rollout prefill": prompt.forward + image.forward,
        "rollout decode": new.forward + Stage(head, passed=DRAW * logits),
        "teacher forward": sum((one.forward for one in run(work.teacher)), Stage(0.0)),
        "student forward": prompt.forward + new.forward + image.forward * looks + low_rank,
        "student backward": sum((one.backward for one in differentiated), low_rank * 2),
        "recomputation": sum((one.recomputed for one in differentiated), low_rank) * recompute,
        # Logits of both policies, and the gradients of hidden states and of a trained head.
        "head and divergence": Stage((3 + full) * head, passed=HEAD * logits),
    }
    step = {name: stage * work.prompts for name, stage in group.items()}
    # A token step reads weights once for all that is sampled together, keys and values of a prompt
    # once for its completions, and on average half of a completion's own.
    weights = ceil(work.prompts / work.sampled) * (shape.products + prod(shape.table))
    cache = shape.cache(work.student.before, options.item)
    cache += work.completions * shape.cache(work.tokens // 2, options.item)
    moved = work.tokens * (options.item * weights + work.prompts * cache)
    return step | {
        "rollout decode": replace(step["rollout decode"], moved=moved),
        "optimizer": Stage(15.0 * count, passed=4.0 * OPTIMIZER * count),
        "teacher's average": Stage(3.0 * count, passed=4.0 * AVERAGE * count),
    }
