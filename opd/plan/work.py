"""The work of one step: lengths, and floating-point operations and bytes moved by stage. A multiplication with its addition counts 2.

Legend: B prompts of a step, n completions of each, P prompt tokens of the student and C of the teacher (the crop), R tokens of a
completion; a group is one prompt with its n completions, and what they share is computed once. A prompt's last token runs with the
completions, whose first it predicts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from opd.memory import FEATURES_MOST
from opd.plan.shape import Attention, Delta, Layer, Shape, Tune, Vision


@dataclass(frozen=True)
class View:
    """One image as a policy sees it: `pieces` (tiles) of `rows` x `columns` patches, `merge` x `merge` of which make a visual token.

    `text` counts all other tokens of the prompt.
    """

    rows: int
    columns: int
    text: int
    merge: int
    pieces: int = 1

    @property
    def patches(self) -> int:
        """Patches of all pieces."""
        return self.pieces * self.rows * self.columns

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return self.patches // self.merge**2

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.visual + self.text

    @property
    def before(self) -> int:
        """Tokens that run as the prompt: all but the last."""
        return self.tokens - 1

    def pairs(self, window: int = 0) -> int:
        """Pairs of patches that attend to each other: of one piece, or of one window of `window` x `window` patches."""

        def squares(side: int) -> int:
            return side**2 if not window else side // window * window**2 + (side % window) ** 2

        return self.pieces * squares(self.rows) * squares(self.columns)


@dataclass(frozen=True)
class Work:
    """A step: `prompts` groups of `completions` completions of `tokens` tokens each.

    They are differentiated in micro-batches of `budget` padded tokens, and sampled in such of `room`. `rows` of the data differ: what a
    frozen tower makes of their images is kept over all steps, up to a bound; 0: no more than the step's own.
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
    def together(self) -> int:
        """Groups of a micro-batch; a group above the budget is alone."""
        return min(self.prompts, max(1, self.budget // self.group))

    @property
    def split(self) -> int:
        """Completions of a group that run at a time; see `opd.method.microbatch.completions_at_once`."""
        few = max(1, (self.budget - self.longest) // self.tokens)
        return few if self.together == 1 and few < self.completions else 0

    @property
    def calls(self) -> int:
        """Micro-batches of a step."""
        return math.ceil(self.prompts / self.together)

    @property
    def sampled(self) -> int:
        """Groups that are sampled together."""
        return min(self.prompts, max(1, self.room // (self.student.tokens + self.completions * self.tokens)))

    def limited(self, groups: int) -> Work:
        """The same step with the budget at which exactly `groups` are differentiated together."""
        return replace(self, budget=groups * self.group)

    def divided(self, split: int) -> Work:
        """The same step with the budget at which `split` completions of a group run at a time."""
        return replace(self, budget=self.longest + split * self.tokens)

    def sampling(self, groups: int) -> Work:
        """The same step with the room in which exactly `groups` are sampled together."""
        return replace(self, room=groups * (self.student.tokens + self.completions * self.tokens))


class Cost(NamedTuple):
    """Operations of a forward: `products` with weights, `mixing` of tokens among each other.

    `once`: those of its products that are not computed again where layers are; `first`: those whose inputs take no gradient.
    """

    products: float
    mixing: float
    once: float = 0.0
    first: float = 0.0

    @property
    def forward(self) -> float:
        """All of it."""
        return self.products + self.mixing

    def backward(self, full: bool) -> float:
        """Gradients of inputs, and, where they are trained, of weights."""
        return 2 * self.mixing + self.products * (1 + full) - self.first

    def again(self) -> float:
        """Up to each layer's last product, whose result nobody needs."""
        return self.forward - self.once

    def plus(self, other: Cost) -> Cost:
        """The sum."""
        return Cost(*(mine + its for mine, its in zip(self, other, strict=True)))


@dataclass(frozen=True)
class Stage:
    """What one stage of a step computes and moves: `operations` at matrix-product speed, which read `moved` bytes meanwhile.

    `passed` bytes are those of elementwise work between the products: norms, activations, softmax; they take time of their own.
    `packed`: those of the operations whose weights stand in 4 bits; in a backward, their transposes.
    """

    operations: float
    moved: float = 0.0
    passed: float = 0.0
    packed: float = 0.0


def tower(vision: Vision, view: View) -> Cost:
    """One image through the tower and its projector."""
    # All frames of a still image are alike, so one stands for them.
    embedded = 2.0 * view.patches * vision.hidden * vision.values // vision.moments
    blocks = 2.0 * view.patches * vision.layers * vision.block
    merged = 2.0 * view.visual * vision.projector.weights
    mixing = 4.0 * vision.hidden * (vision.whole * view.pairs() + vision.windowed * view.pairs(vision.window))
    last = 2.0 * view.patches * vision.layers * vision.hidden * vision.intermediate
    return Cost(embedded + blocks + merged, mixing, embedded + merged + last, embedded)


def prefix(shape: Shape, view: View) -> Cost:
    """A prompt without its last token; of the last layer only what it hands to completions is computed."""
    products, mixing, last = 0.0, 0.0, 0.0
    for number, layer in enumerate(shape.layers):
        final = number + 1 == len(shape.layers)
        products += 2.0 * view.before * shape.products(layer, handed=final)
        last += 0.0 if final else view.before * _last(shape)
        mixing += 0.0 if final and isinstance(layer, Attention) else _mixing(layer, view.before, _of_prompt(layer, view))
    return Cost(products, mixing, last)


def completions(shape: Shape, before: int, length: int, count: int) -> Cost:
    """`count` completions of `length` tokens after `before` tokens of their prompt."""
    rows = count * length
    mixing = sum(many * _mixing(layer, rows, count * _of_completion(layer, before, length)) for layer, many in shape.kinds.items())
    return Cost(2.0 * rows * shape.weights, mixing, rows * len(shape.layers) * _last(shape))


def reused(shape: Shape, tune: Tune, work: Work, room: int) -> bool:
    """Whether image features are computed once a step: the tower is frozen, and both policies' take at most `room` bytes."""
    visual = work.prompts * (work.student.visual + work.teacher.visual)
    return not tune.sees and 4 * visual * shape.hidden * (1 + shape.vision.taps) <= room


def stages(shape: Shape, tune: Tune, work: Work, item: int, checkpointed: bool, room: int = FEATURES_MOST) -> dict[str, Stage]:
    """Every stage of a step; `item` bytes of a number in computation, `room` bytes for a frozen tower's features.

    With `checkpointed`, layers are computed twice.
    """
    once, full = reused(shape, tune, work, room), tune.full
    rows = work.completions * work.tokens
    image = tower(shape.vision, work.student)
    prompt, teacher_prompt = prefix(shape, work.student), prefix(shape, work.teacher)
    completed = completions(shape, work.student.before, work.tokens, work.completions)
    teacher_completed = completions(shape, work.teacher.before, work.tokens, work.completions)
    text = prompt.plus(completed)
    differentiated = text.plus(image) if tune.sees else text
    head = 2.0 * shape.embedding
    trained = tune.trained(shape)
    # Adapters' own products, over which the gradients of inputs and of weights are as many each.
    adapters = 0.0 if full else 2.0 * trained["language"] * (work.student.before + rows)
    each = {
        "rollout prefill": prompt.forward + image.forward,
        "rollout decode": completed.forward + rows * head,
        "teacher forward": teacher_completed.forward + teacher_prompt.forward + tower(shape.vision, work.teacher).forward,
        "student forward": text.forward + adapters + image.forward * (not once),
        "student backward": differentiated.backward(full) + 2 * adapters,
        "recomputation": (differentiated.again() + adapters) * checkpointed,
        # Logits of both policies, and the gradients of the student's hidden states and, where it is trained, of the head.
        "head and divergence": (3 + full) * rows * head,
    }
    packed = {
        "rollout prefill": prompt.products,
        "rollout decode": completed.products,
        "teacher forward": teacher_prompt.products + teacher_completed.products,
        "student forward": text.products,
        "student backward": text.products,
        "recomputation": (text.products - text.once) * checkpointed,
    }
    found = {
        name: Stage(work.prompts * operations, packed=work.prompts * packed.get(name, 0.0) * (tune.kind == "qlora"))
        for name, operations in each.items()
    }
    found["rollout decode"] = replace(found["rollout decode"], moved=_decoded(shape, work, item))
    count = sum(trained.values())
    found["optimizer"] = Stage(15.0 * count)
    found["teacher's average"] = Stage(3.0 * count)
    return found


def _decoded(shape: Shape, work: Work, item: int) -> float:
    """Bytes that token steps read: the weights once for all that is sampled together, and of each group what its layers keep.

    A prompt's keys and values are read once, each completion's own half on average; a state is read and written.
    """
    calls = math.ceil(work.prompts / work.sampled)
    kept = 0.0
    for layer, count in shape.kinds.items():
        if isinstance(layer, Delta):
            kept += count * work.completions * 2 * 4 * layer.state
        else:
            reach = work.student.before + work.tokens if layer.window is None else layer.window
            own = work.completions * min(work.tokens / 2, reach)
            kept += count * 2.0 * item * layer.key * (min(work.student.before, reach) + own)
    return work.tokens * (calls * item * (shape.weights + shape.embedding) + work.prompts * kept)


def _last(shape: Shape) -> float:
    """Operations of a token in a layer's last product; where a norm follows, which needs its result, none is the last."""
    return 0.0 if shape.norms > 2 else 2.0 * shape.hidden * shape.intermediate


def _mixing(layer: Layer, rows: int, pairs: float) -> float:
    """Operations of `rows` among each other: scores and mixture of each pair, or a state that is read, written and read again."""
    if isinstance(layer, Delta):
        return rows * (6.0 * layer.state + 2.0 * layer.channels * layer.kernel)
    return 4.0 * pairs * layer.query


def _of_prompt(layer: Layer, view: View) -> float:
    """Pairs of a prompt's tokens of which one sees the other."""
    if isinstance(layer, Delta):
        return 0.0
    each = view.visual // view.pieces
    later = view.pieces * each * (each - 1) / 2 if layer.blocks else 0.0
    return _of_completion(layer, 0, view.before) + later


def _of_completion(layer: Layer, before: int, length: int) -> float:
    """Pairs of `length` tokens with themselves and with `before` tokens, of which each sees its window or all."""
    if isinstance(layer, Delta):
        return 0.0
    window = layer.window or before + length
    free = max(0, min(length, window - before))
    return free * before + free * (free + 1) / 2 + (length - free) * window
