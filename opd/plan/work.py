"""One step: its lengths, how it is cut into what runs together, and the work of its stages.

A group is a prompt with its completions. A prompt's last token runs with the completions, whose
first token it predicts. An operation is a multiplication or an addition: 2 for each weight and row,
and 4 for each pair of rows that attend and each number of their heads. What passes over memory
between products is rough. What completions of a prompt share is computed once.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from math import ceil, prod
from operator import add
from typing import NamedTuple

from opd.models.adapters import chosen_layers, part_of_model
from opd.plan.shape import Shape, item_of, sees
from opd.planner import Footprint, Rows
from opd.types import ModelOptions

FORWARD, BACKWARD = 3, 5
"""Passes over what a backward holds: written, read twice; read, its gradient written, added,
read."""

PASSING = 0.45
"""The share of a layer's activations that pass by in a forward without a backward."""

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
    def calls(self) -> int:
        """Micro-batches of a step."""
        return ceil(self.prompts / self.together)

    @property
    def sampled(self) -> int:
        """Groups that are sampled together."""
        return min(self.prompts, max(1, self.room // self.sample))

    def lengths(self, groups: int, view: View, completions: int) -> tuple[Rows, Rows, Rows]:
        """Rows of so many groups, and completions of each, where a policy sees `view`."""
        patches = Rows("patches", groups * view.pieces, view.patches // view.pieces)
        new = Rows("completions", groups * completions, self.tokens, view.before)
        return patches, Rows("prompts", groups, view.before), new


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


class Held(NamedTuple):
    """Bytes: `total`, what is held at the end of a forward; `layer`, what passes by in the backward
    of the widest layer; `forward`, what passes by in it where no backward follows."""

    total: float
    layer: float
    forward: float


def held_of(
    shape: Shape, options: ModelOptions, rows: Rows, rough: Footprint, recompute: bool = False
) -> Held:
    """What the rows hold; with `recompute` each layer's inputs, and one layer whole."""
    item, text, layers = item_of(options), rows.kind != "patches", shape.of(rows)
    each = [rough.layer(one, rows) for one in layers]
    forward = PASSING * max(kept for kept, _ in each)
    if rows.kind == "prompts" and not layers[-1].state:
        # The last layer gives of a prompt the keys and values for completions alone.
        each[-1] = (4.0 * item * rows.total * layers[-1].key, 0.0)
    layer = max(kept * recompute + passes for kept, passes in each)
    if recompute:
        stream = rough.stream if text else item
        total = float(rows.total * stream * sum(one.width for one in layers))
        total += rows.count * shape.cache(rows.length, item) * (rows.kind == "prompts")
    else:
        total = sum(kept for kept, _ in each)
        if options.adapters and text:
            names = chosen_layers(options.adapters, shape.linears)
            adapted = sum(part_of_model(name) == "language" for name in names)
            total += rows.total * item * adapted * options.adapters.rank
    if rows.kind == "completions":
        # The states of recurrences, and the rows that the head reads.
        total += rows.count * shape.cache(0, item) + 12 * rows.total * shape.table[1]
    return Held(total, layer, forward)


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

    def costs(view: View) -> list[Cost]:
        every = work.lengths(1, view, work.completions)
        return [cost(shape, options, view, rows, rough) for rows in every]

    image, prompt, own = costs(work.student)
    back = [prompt, own, image] if seen else [prompt, own]
    rows = work.completions * work.tokens
    head, logits = 2.0 * rows * prod(shape.table), 4.0 * rows * shape.table[0]
    # Of adapters; the gradients of their inputs and of their weights are as many each.
    beside = 0.0 if full else 2.0 * trained["language"] * (work.student.before + rows)
    low_rank, count = Stage(beside), sum(trained.values())
    group = {
        "rollout prefill": prompt.forward + image.forward,
        "rollout decode": own.forward + Stage(head, passed=DRAW * logits),
        "teacher forward": sum((one.forward for one in costs(work.teacher)), Stage(0.0)),
        "student forward": prompt.forward + own.forward + image.forward * looks + low_rank,
        "student backward": sum((one.backward(full) for one in back), low_rank * 2),
        "recomputation": sum((one.again for one in back), low_rank) * recompute,
        # Logits of both policies, and the gradients of hidden states and of a trained head.
        "head and divergence": Stage((3 + full) * head, passed=HEAD * logits),
    }
    step = {name: stage * work.prompts for name, stage in group.items()}
    # Token steps read weights once for all that is sampled together, keys and values of a prompt
    # once for its completions, and half of a completion's own on average.
    item = item_of(options)
    weights = ceil(work.prompts / work.sampled) * item * (shape.products + prod(shape.table))
    cache = shape.cache(work.student.before, item)
    cache += work.completions * shape.cache(work.tokens // 2, item)
    moved = work.tokens * (weights + work.prompts * cache)
    return step | {
        "rollout decode": replace(step["rollout decode"], moved=moved),
        "optimizer": Stage(15.0 * count, passed=4.0 * OPTIMIZER * count),
        "teacher's average": Stage(3.0 * count, passed=4.0 * AVERAGE * count),
    }


def cost(shape: Shape, options: ModelOptions, view: View, rows: Rows, rough: Footprint) -> Cost:
    """An image, its prompt without the last token, or all completions of the prompt, through all
    layers; the last one computes of a prompt only what a cache holds."""
    products = last = mixing = later = 0.0
    if rows.kind == "prompts" and rough.blocks:
        # Tokens of an image see each other in both directions, not only those before them.
        each = view.visual // view.pieces
        later = view.pieces * each * (each - 1) / 2
    for layer in shape.of(rows):
        if rows.kind == "prompts" and layer is shape.text[-1]:
            products += layer.cached
        else:
            products, last = products + layer.products, last + layer.last
            reach = layer.window or rows.before + rows.length
            free = max(0, min(rows.length, reach - rows.before))
            pairs = free * (rows.before + (free + 1) / 2) + (rows.length - free) * reach
            mixing += 4.0 * layer.query * (pairs + later)
        mixing += 6.0 * layer.state * rows.length
    held, first, total = held_of(shape, options, rows, rough).total, 0.0, 2.0 * rows.total
    products, last, mixing = products * total, last * total, mixing * rows.count
    if rows.kind == "patches":
        first, merged = total * shape.embedding, 2.0 * view.visual * shape.projector
        products, last = products + first + merged, last + first + merged
        mixing = 4.0 * shape.tower[0].width * view.pairs
    return Cost(products, mixing, held, first, last, options.four_bit and rows.kind != "patches")
