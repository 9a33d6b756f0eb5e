"""Memory of one step by part and by phase, in bytes.

Weights, gradients, moments, caches and features are counted exactly. What passes by while a policy
computes is a backend's own rough figure (`opd.planner.Footprint`), and is named so.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from opd.plan.shape import Shape, item_of, sees
from opd.plan.work import Work, held_of
from opd.planner import Footprint
from opd.types import ModelOptions

KEPT_FEATURES = "kept image features"
"""Held where the vision tower is frozen; grows from step to step up to a bound."""

ROUGH = ("activations", "one layer", "head chunks", "sampled logits")
"""Parts that a backend knows roughly."""

FOUR_BITS = 4.5 / 8
"""Bytes of a 4-bit weight, with its share of a scale and an offset for every 64 weights."""

ROOM, DRAWN = 64, 20
"""Tokens of the first buffer of a completion's keys, which doubles when it is full; bytes of a
logit that is sampled from."""


@dataclass(frozen=True)
class Memory:
    """`held` from step to step; `parts` that come and go; `phases`: the largest sum in each."""

    held: dict[str, int]
    parts: dict[str, int]
    phases: dict[str, int]
    checkpointed: bool
    disk: int

    @property
    def peak(self) -> int:
        """The largest of all phases."""
        return max(self.phases.values())


def memory(
    shape: Shape,
    options: ModelOptions,
    work: Work,
    rough: Footprint,
    room: float,
    recompute: bool | None = None,
) -> Memory:
    """Memory of a step; `recompute` None leaves the choice to the backend's rule.

    On a GPU backends keep the activations that fit in what is free, so the peak is the least that
    they need. `room` bytes hold a frozen tower's features at most.
    """
    per_part, item = shape.trained(options), item_of(options)
    trained, table, per_prompt = sum(per_part.values()), prod(shape.table), work.student.before
    gradient, casts, logit = 4 * trained, rough.cast * trained, 4 * shape.table[0]
    full, seen = options.adapters is None, sees(options)
    lengths = work.lengths(work.together, work.student, work.split or work.completions)
    wanted = int(rough.margin * shape.held(lengths, rough.layer))
    again = wanted > rough.recompute_above if recompute is None else recompute

    packed = shape.products * options.four_bit
    plain = sum(shape.parameters.values()) - packed - trained * full
    visual = max(work.prompts, work.rows) * (work.student.visual + work.teacher.visual)
    held = {
        "frozen weights": int(plain * rough.frozen + packed * FOUR_BITS),
        "trained weights": 4 * trained,
        "teacher": 4 * trained,
        "optimizer moments": 8 * trained,
        KEPT_FEATURES: 0 if seen else int(min(room, visual * shape.feature)),
    }
    before = sum(held.values())

    # Sampling: one layer's pass over the prompts, or token steps over keys and values. The pass
    # waits for the gradient where it is small.
    prompts = work.lengths(work.sampled, work.student, work.completions)
    image, prompt, _ = (held_of(shape, options, rows, rough) for rows in prompts)
    few = work.sampled * work.student.tokens <= rough.keeps_tokens
    graph = int(rough.margin * shape.held(prompts[:2], rough.layer))
    kept = (image.total * seen + prompt.total) * (few and graph <= rough.recompute_above)
    read = work.sampled * shape.cache(per_prompt, item)
    own = ROOM << max(0, -(-work.tokens // ROOM) - 1).bit_length()
    grown = prompts[2].count * shape.cache(own, item)
    logits = DRAWN * min(prompts[2].count * shape.table[0], rough.chunk // 4)
    logits += rough.head_copy * table
    rollout = max(read, kept) + max(image.forward, prompt.forward, grown + logits)

    # The gradient: the teacher's pass, the head, and the backward of each part, of which the later
    # are gone.
    image, prompt, completion = (held_of(shape, options, one, rough, again) for one in lengths)
    taught = work.lengths(work.together, work.teacher, 1)[:2]
    teacher = max(held_of(shape, options, one, rough).forward for one in taught)
    images, summed = image.total * seen, gradient * (work.calls > 1)
    most, late = rough.head
    chunk = logit * min(lengths[2].total, max(16, rough.chunk // logit))
    of_head = 4 * table * full
    head = max(most * chunk, late * chunk * full + of_head) + rough.head_copy * table
    # A quarter of a layer's gradient stands for that of its largest parameter.
    layer = 4 * (shape.products if full else per_part["language"]) // len(shape.text)
    sums = min(layer, rough.sums + layer // 4) if rough.sums else 0
    # Gradients to what completions read of their prompts, and what the teacher's read.
    asked = work.together * shape.cache(per_prompt, rough.cache_sums or item)
    answered = work.together * shape.cache(work.teacher.before, item)
    early, late = (asked, 0) if rough.cache_sums else (0, asked)
    text = images + prompt.total + early + casts * (rough.keeps_casts or not again)
    accumulate = max(
        summed + casts + answered + teacher,
        text + summed + completion.total + max(head, of_head + completion.layer + sums),
        text + gradient + late + sums + max(completion.layer, prompt.layer),
        images + gradient + (image.layer + sums) * seen,
    )
    parts = {
        "gradient": gradient,
        "weights in bfloat16": casts,
        "activations": images + prompt.total + completion.total,
        "one layer": max(image.layer * seen, prompt.layer, completion.layer),
        "head chunks": head,
        "key-value cache": read + grown,
        "sampled logits": logits,
    }
    phases = {
        "rollout": before + casts + int(rollout),
        "accumulate": before + int(accumulate),
        "apply": before + gradient + min(gradient, rough.apply),
    }
    ints = {name: int(size) for name, size in parts.items() if size}
    some = {name: size for name, size in held.items() if size}
    return Memory(some, ints, phases, again, disk=4 * gradient)
