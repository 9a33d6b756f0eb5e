"""The work of one step: lengths, and floating-point operations and bytes moved by stage. A multiplication with its addition counts 2.

Legend: B prompts of a step, n completions of each, P prompt tokens of the student and C of the teacher (the crop), R tokens of a
completion; a group is one prompt with its n completions, and what they share is computed once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from opd.plan.shape import Shape, Tune, Vision

HEAD_PRODUCTS = 4
"""Matrix products of the head: logits of both policies, and the gradients of the student's hidden states and of the head."""

KNOWN_BYTES = 2**30
"""Image features of a frozen tower that the backends keep within a step."""


@dataclass(frozen=True)
class View:
    """One image as a policy sees it: `patches` of the image, and `text` tokens around the visual ones; `merge` as in `Vision`."""

    patches: int
    text: int
    merge: int

    @property
    def visual(self) -> int:
        """Visual tokens."""
        return self.patches // self.merge**2

    @property
    def tokens(self) -> int:
        """Tokens of the prompt."""
        return self.visual + self.text


@dataclass(frozen=True)
class Work:
    """A step: `prompts` groups of `completions` completions of `tokens` tokens each, in micro-batches of `budget` padded tokens."""

    prompts: int
    completions: int
    tokens: int
    student: View
    teacher: View
    budget: int

    @property
    def group(self) -> int:
        """Padded tokens of one group in the accumulating phase, where the longer prompt counts."""
        return max(self.student.tokens, self.teacher.tokens) + self.completions * self.tokens

    @property
    def together(self) -> int:
        """Groups of a micro-batch; a group above the budget runs alone."""
        return min(self.prompts, max(1, self.budget // self.group))

    @property
    def calls(self) -> int:
        """Micro-batches of a step."""
        return math.ceil(self.prompts / self.together)

    def limited(self, groups: int) -> Work:
        """The same step with the budget at which exactly `groups` run together."""
        return replace(self, budget=groups * self.group)


@dataclass(frozen=True)
class Stage:
    """What one stage of a step computes and moves: `operations` at matrix-product speed, `moved` bytes at memory bandwidth."""

    operations: float
    moved: float = 0.0


def tower(vision: Vision, out: int, patches: int) -> float:
    """Operations of one image through the tower and its mergers; attention is over all patches of the image."""
    products = vision.hidden * vision.values + vision.layers * vision.block + vision.merger(out) / vision.merge**2
    return 2.0 * patches * products + 4.0 * patches**2 * vision.hidden * vision.layers


def prefix(shape: Shape, tokens: int) -> float:
    """Operations of a prompt; the last layer gives keys and values alone, and causal attention is half of full."""
    whole = shape.layers - 1
    keys = 2 * shape.hidden * shape.key
    return 2.0 * tokens * (whole * shape.layer + keys) + 2.0 * tokens**2 * shape.query * whole


def completions(shape: Shape, tokens: int, length: int, count: int) -> float:
    """Operations of `count` completions of `length` tokens after a prompt of `tokens`: all see the prompt, and half of themselves."""
    rows = count * length
    return 2.0 * rows * shape.layers * shape.layer + 4.0 * rows * (tokens + length / 2) * shape.query * shape.layers


def reused(shape: Shape, tune: Tune, work: Work) -> bool:
    """Whether image features are computed once a step: the tower is frozen, and what is kept of both policies' images fits."""
    visual = work.prompts * (work.student.visual + work.teacher.visual)
    return not tune.sees and 4 * visual * shape.hidden * (1 + shape.vision.taps) <= KNOWN_BYTES


def stages(shape: Shape, tune: Tune, work: Work, item: int, checkpointed: bool) -> dict[str, Stage]:
    """Every stage of a step; `item` bytes of a number in computation. With `checkpointed`, layers are computed twice."""
    once = reused(shape, tune, work)
    rows = work.completions * work.tokens
    student_image = tower(shape.vision, shape.hidden, work.student.patches)
    teacher_image = tower(shape.vision, shape.hidden, work.teacher.patches)
    student = prefix(shape, work.student.tokens) + completions(shape, work.student.tokens, work.tokens, work.completions)
    teacher = prefix(shape, work.teacher.tokens) + completions(shape, work.teacher.tokens, work.tokens, work.completions)
    forward = student + student_image * (not once)
    differentiated = student + student_image * tune.sees
    # A frozen matrix takes the gradient of its input only, not of itself.
    backward = differentiated * (2 if tune.full else 1)
    head = 2.0 * shape.embedding
    trained = sum(tune.trained(shape).values())
    weights = item * (shape.layers * shape.layer + shape.embedding)
    cache = 2.0 * item * shape.key * shape.layers
    # A token step of a micro-batch reads the weights once, each prompt's keys and values once, and each completion's own, half on average.
    read = work.tokens * (work.calls * weights + work.prompts * cache * (work.student.tokens + work.completions * work.tokens / 2))
    each = {
        "rollout prefill": prefix(shape, work.student.tokens) + student_image,
        "rollout decode": completions(shape, work.student.tokens, work.tokens, work.completions) + rows * head,
        "teacher forward": teacher + teacher_image,
        "student forward": forward,
        "student backward": backward,
        "recomputation": differentiated * checkpointed,
        "head and divergence": HEAD_PRODUCTS * rows * head,
    }
    found = {name: Stage(work.prompts * operations, read if name == "rollout decode" else 0.0) for name, operations in each.items()}
    # AdamW reads and writes parameter and both moments, and reads the gradient twice; the teacher is read and written, the student read.
    found["optimizer"] = Stage(15.0 * trained, 8 * 4.0 * trained)
    found["teacher's average"] = Stage(3.0 * trained, 3 * 4.0 * trained)
    return found
