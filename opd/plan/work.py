"""The work of one step: operations and bytes moved by stage.

An operation is a multiplication or an addition: 2 for each weight and row, and 4 for each pair of
rows that attend and each number of their heads. What passes over memory between products is rough.
What completions of a prompt share is computed once.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from math import ceil, prod
from operator import add
from typing import NamedTuple

from opd.plan.activations import held_of
from opd.plan.shape import Shape, item_of, sees
from opd.plan.step import View, Work
from opd.planner import Footprint, Rows
from opd.types import ModelOptions

FORWARD, BACKWARD = 3, 5
"""Passes over what a backward holds: written, read twice; read, its gradient written, added,
read."""

HEAD, DRAW, OPTIMIZER, AVERAGE = 20, 10, 24, 3
"""Passes over logits that are trained on, or drawn from; over trained parameters in the optimizer's
step, and where the teacher moves."""


@dataclass(frozen=True)
class Stage:
    """A stage of a step: `operations` at the speed of products, which read `moved` bytes meanwhile;
    `passed` bytes of elementwise work take time of their own. `packed`: the operations whose
    weights are held in 4 bits; in a backward, their transposes."""

    operations: float
    moved: float = 0.0
    passed: float = 0.0
    packed: float = 0.0

    def __add__(self, other: Stage) -> Stage:
        return Stage(*map(add, astuple(self), astuple(other)))

    def __mul__(self, times: float) -> Stage:
        return Stage(*(times * size for size in astuple(self)))


class Cost(NamedTuple):
    """Operations of a forward: `products` with weights, `mixing` of rows among each other; and the
    bytes that are `held` for its backward.

    Among the products, `first`: those whose inputs take no gradient; `last`: those that no backward
    computes again, since nobody needs their results; `packed`: the share that 4 bits hold.
    """

    products: float
    mixing: float
    held: float
    first: float
    last: float
    packed: bool

    @property
    def forward(self) -> Stage:
        """The forward."""
        operations = self.products + self.mixing
        return Stage(operations, 0.0, FORWARD * self.held, self.products * self.packed)

    def backward(self, full: bool) -> Stage:
        """Gradients of inputs, and of weights where all are trained."""
        operations = self.products * (1 + full) + 2 * self.mixing - self.first
        return Stage(operations, 0.0, BACKWARD * self.held, self.products * self.packed)

    @property
    def again(self) -> Stage:
        """What a backward computes again."""
        return self.forward + Stage(-self.last, packed=-self.last * self.packed)


def stages(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, recompute: bool, room: float
) -> dict[str, Stage]:
    """Every stage of a step; `room` bytes hold the features of a frozen tower, once computed.

    With `recompute`, layers are computed twice.
    """
    full, seen, trained = options.adapters is None, sees(options), shape.trained(options)
    visual = work.prompts * (work.student.visual + work.teacher.visual)
    looks = seen or visual * shape.feature > room
    image, prompt, own = costs(shape, options, work, work.student, rough)
    taught = costs(shape, options, work, work.teacher, rough)
    back = [prompt, own, image] if seen else [prompt, own]
    rows = work.completions * work.tokens
    head, logits = 2.0 * rows * prod(shape.table), 4.0 * rows * shape.table[0]
    # Of adapters; the gradients of their inputs and of their weights are as many each.
    beside = 0.0 if full else 2.0 * trained["language"] * (work.student.before + rows)
    low_rank, count = Stage(beside), sum(trained.values())
    group = {
        "rollout prefill": prompt.forward + image.forward,
        "rollout decode": own.forward + Stage(head, passed=DRAW * logits),
        "teacher forward": sum((one.forward for one in taught), Stage(0.0)),
        "student forward": prompt.forward + own.forward + image.forward * looks + low_rank,
        "student backward": sum((one.backward(full) for one in back), low_rank * 2),
        "recomputation": sum((one.again for one in back), low_rank) * recompute,
        # Logits of both policies, and the gradients of hidden states and of a trained head.
        "head and divergence": Stage((3 + full) * head, passed=HEAD * logits),
    }
    step = {name: stage * work.prompts for name, stage in group.items()}
    moved = read(shape, work, item_of(options))
    return step | {
        "rollout decode": replace(step["rollout decode"], moved=moved),
        "optimizer": Stage(15.0 * count, passed=4.0 * OPTIMIZER * count),
        "teacher's average": Stage(3.0 * count, passed=4.0 * AVERAGE * count),
    }


def costs(
    shape: Shape, options: ModelOptions, work: Work, view: View, rough: Footprint
) -> tuple[Cost, Cost, Cost]:
    """An image, its prompt without the last token, and all completions of the prompt."""
    whole = replace(work, budget=work.group).lengths(1, view)
    images, prompts, new = (held_of(shape, options, rows, rough).total for rows in whole)
    embedded, merged = 2.0 * view.patches * shape.embedding, 2.0 * view.visual * shape.projector
    layers = 2.0 * view.patches * sum(one.products for one in shape.tower)
    last = 2.0 * view.patches * sum(one.last for one in shape.tower)
    mixing, products = 4.0 * shape.tower[0].width * view.pairs, embedded + layers + merged
    image = Cost(products, mixing, images, embedded, embedded + merged + last, False)
    # Tokens of an image see each other in both directions, or only those before them.
    each = view.visual // view.pieces
    later = rough.blocks * view.pieces * each * (each - 1) / 2
    packed = options.four_bit
    prompt = text_cost(shape, whole.prompts, prompts, packed, later)
    return image, prompt, text_cost(shape, whole.completions, new, packed)


def text_cost(shape: Shape, rows: Rows, held: float, packed: bool, later: float = 0.0) -> Cost:
    """Rows through all layers, where `later` pairs attend beside those in order; of a prompt the
    last layer computes only what a cache holds."""
    products = last = mixing = 0.0
    for layer in shape.layers:
        cached = rows.kind == "prompts" and layer is shape.layers[-1]
        products += layer.cached if cached else layer.products
        last += 0 if cached else layer.last
        mixing += 6.0 * layer.state * rows.length
        if not cached:
            reach = layer.window or rows.before + rows.length
            free = max(0, min(rows.length, reach - rows.before))
            pairs = free * (rows.before + (free + 1) / 2) + (rows.length - free) * reach
            mixing += 4.0 * layer.query * (pairs + later)
    total = 2.0 * rows.total
    return Cost(total * products, rows.count * mixing, held, 0.0, total * last, packed)


def read(shape: Shape, work: Work, item: int) -> float:
    """Bytes that token steps read: weights once for all that is sampled together, keys and values.

    Those of a prompt are read once for its completions, and of a completion half on average.
    """
    weights = ceil(work.prompts / work.sampled) * item * (shape.products + prod(shape.table))
    own = work.completions * shape.cache(work.tokens // 2, item)
    return work.tokens * (weights + work.prompts * (shape.cache(work.student.before, item) + own))
