"""Memory of one step by part and by phase, in bytes.

Weights, gradients, moments, caches and features are counted exactly. What passes by while a policy
computes is a backend's own rough figure (`opd.planner.Footprint`), and is named so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from operator import itemgetter

from opd.models.adapters import part_of_model
from opd.plan.shape import Layer, Shape, item_of, sees
from opd.plan.work import View, Work
from opd.planner import Footprint, Row
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


@dataclass(frozen=True)
class Activations:
    """What a backward holds of a micro-batch's images, prompts and completions, and of each what
    passes by in the backward of one layer."""

    images: float
    prompts: float
    completions: float
    layer: tuple[float, float, float]

    @property
    def total(self) -> float:
        """All that is held at the end of the forward."""
        return self.images + self.prompts + self.completions


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
    trained, item = sum(shape.trained(options).values()), item_of(options)
    full, gradient, table = options.adapters is None, 4 * trained, prod(shape.table)
    wanted = rough.estimate(work.lengths)
    again = wanted > rough.recompute_above if recompute is None else recompute
    held = _held(shape, options, work, rough, room)
    before, weights = sum(held.values()), trained - table * (full and not rough.cast_tables)
    casts = rough.cast[0] * weights

    def passing(view: View, prompts: int) -> float:
        """The widest layer of a forward without a backward, of the tower or of the prompts; of a
        layer with a recurrence its rows are gone where that runs."""
        share, solved = rough.forward
        text = max(
            max(share * (one.held(rough.prompt) - rule), solved * rule)
            for one in shape.layers
            for rule in [rough.prompt.recurrence * one.recurs]
        )
        image = share * max(one.held(rough.patch) for one in shape.tower)
        return prompts * max(view.before * text, view.patches * image)

    # Sampling: one layer's pass over the prompts, or token steps over keys and values.
    chunks, blocks, most, block = rough.head
    copies = rough.head_copy * table
    own = ROOM << max(0, -(-work.tokens // ROOM) - 1).bit_length()
    read = work.sampled * shape.cache(work.student.before, item)
    grown = work.sampled * work.completions * shape.cache(own, item)
    drawn = min(work.sampled * work.completions * shape.table[0], most // 4)
    # A rollout's pass over its prompts waits for the gradient where it is small.
    alone = replace(
        work, completions=0, teacher=work.student, budget=work.sampled * work.student.tokens
    )
    few = alone.budget <= rough.keeps_tokens
    kept = few and rough.estimate(alone.lengths) <= rough.recompute_above
    waits = kept * activations(shape, options, alone, rough, recompute=False).total
    logits = DRAWN * drawn + copies
    first = waits + read * (waits > 0 and rough.cache_sums > 0)
    rollout = max(first, read) + max(passing(work.student, work.sampled), grown + logits)

    # The gradient. Hidden states, their gradient and the head's stand beside the buffers of logits.
    student = activations(shape, options, work, rough, again)
    summed, many = gradient * (work.calls > 1), work.count * work.tokens
    rows = max(16, most // (4 * shape.table[0]))
    chunk = 4 * shape.table[0] * min(many, rows)
    buffers = chunks * chunk + blocks * min(chunk, block) + (1 + full) * copies
    states = many * shape.table[1] * (2 * item + 4) + 4 * table * full
    if full and rough.head_late:
        # Of the first chunk after its buffers, of every later one beside their sum.
        later = 4 * table * (many > rows)
        buffers = max(buffers - 4 * table + later, rough.head_late * chunk + later)
    sums = shape.sums(options, rough.sums)
    tower, prompt, completion = (
        max(layer, sums) if rough.sums is None else layer + sums for layer in student.layer
    )
    if not work.split and not summed:
        completion = student.layer[2]
    asked = work.together * shape.cache(work.student.before, rough.cache_sums or item)
    taught = work.together * shape.cache(work.teacher.before, item)
    served = waits * (work.sampled == work.together == work.prompts)
    early, late = (asked, 0) if rough.cache_sums else (0, asked)
    text = student.images + student.prompts + early + rough.cast[again] * weights
    done = 0 if again else student.completions / len(shape.layers)
    accumulate = max(
        summed + served + casts + taught + passing(work.teacher, work.together),
        text + summed + student.completions + states + max(buffers, completion),
        text + gradient + late + max(done + completion, prompt),
        student.images + gradient + tower,
    )
    parts = {
        "gradient": gradient,
        "weights in bfloat16": casts,
        "activations": student.total,
        "one layer": max(student.layer),
        "head chunks": buffers + states,
        "key-value cache": read + grown,
        "sampled logits": logits,
    }
    phases = {
        "rollout": before + casts + int(rollout),
        "accumulate": before + int(accumulate),
        "apply": before + gradient + min(gradient, rough.apply),
    }
    ints = {name: int(size) for name, size in parts.items()}
    return Memory(held, ints, phases, again, disk=4 * gradient)


def activations(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, recompute: bool
) -> Activations:
    """What the student's forward holds; with `recompute`, each layer's inputs, and one layer
    whole."""
    view, item, config = work.student, item_of(options), shape.config
    images, before = work.together * sees(options), work.together * view.before
    many, narrow = work.count * work.tokens, item * shape.narrow(options)
    score, most, block, at_most = rough.scores

    def layer(one: Layer, row: Row, rows: float, pairs: float, beside: float) -> list[float]:
        """What is held, and what passes by in the backward."""
        scores = score * pairs * (not one.recurs)
        kept = rows * one.held(row) + beside + scores * (scores <= most)
        passes = rows * row.passing * one.recurs + min(2 * scores, at_most)
        return [kept, rough.backward * kept + passes]

    heads: int = config["text_config"]["num_attention_heads"]
    patches, of_tower = images * view.patches, shape.tower
    pairs = images * view.pairs / len(of_tower) * shape.tower_heads
    tower = [layer(one, rough.patch, patches, pairs, 0) for one in of_tower]
    prompts, completions = [], []
    for one, window in zip(shape.layers, shape.windows, strict=True):
        pairs = heads * before * min(view.before, (view.before + block) / 2)
        prompts.append(layer(one, rough.prompt, before, pairs, before * narrow))
        pairs = heads * many * (view.before + min(work.tokens, (work.tokens + block) / 2))
        copied = rough.copies == "always" or (rough.copies == "windows" and window is not None)
        beside = many * narrow + 2 * item * work.count * one.key * view.before * copied
        completions.append(layer(one, rough.completion, many, pairs, beside))
    if not shape.layers[-1].recurs:
        # The last layer gives of a prompt the keys and values for completions alone.
        prompts[-1] = [4 * item * before * shape.layers[-1].key, 0.0]
    held = [sum(kept for kept, _ in each) for each in (tower, prompts, completions)]
    largest = [
        max(map(sum if recompute else itemgetter(1), each))
        for each in (tower, prompts, completions)
    ]
    held[2] += work.count * 4 * shape.states
    if recompute:
        row = rough.stream * sum(one.width for one in shape.layers)
        held = [
            patches * item * sum(one.width for one in of_tower),
            before * row + work.together * shape.cache(view.before, item),
            many * row,
        ]
    # Inputs and outputs of the projector's products; of completions the states that the head reads.
    merged = 2 * item * sum(size[1] for size in shape.parts["projector"].values() if len(size) == 2)
    held[0] += images * view.visual * merged
    held[2] += many * shape.table[1] * 12
    return Activations(held[0], held[1], held[2], (largest[0], largest[1], largest[2]))


def _held(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, room: float
) -> dict[str, int]:
    trained, full = sum(shape.trained(options).values()), options.adapters is None
    language = (
        prod(size) for name, size in shape.linears.items() if part_of_model(name) == "language"
    )
    packed = sum(language) * options.four_bit
    plain = sum(shape.parameters.values()) - packed - trained * full
    visual = max(work.prompts, work.rows) * (work.student.visual + work.teacher.visual)
    parts = {
        "frozen weights": int(plain * rough.frozen + packed * FOUR_BITS),
        "trained weights": 4 * trained,
        "teacher": 4 * trained,
        "optimizer moments": 8 * trained,
        KEPT_FEATURES: 0 if sees(options) else int(min(room, visual * shape.feature)),
    }
    return {name: size for name, size in parts.items() if size}
