"""Memory of one step by part and by phase, in bytes.

Weights, gradients, moments, caches and features are counted exactly. What comes and goes while a
policy computes is a backend's own rough figure (`opd.planner.Footprint`), and is named so.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from opd.memory import CHUNK_BYTES, PREFILL_TOKENS
from opd.models.adapters import chosen_layers, part_of_model
from opd.models.shape import Shape
from opd.plan.work import Work
from opd.planner import Footprint, Rows
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

PASSING = 0.45
"""The share of a layer's activations that come and go in a forward without a backward."""


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
    trained, table, item = sum(shape.trained(options).values()), prod(shape.table), options.item
    full, sees, bound = options.adapters is None, options.tunes_features, options.checkpoint_above
    gradient, casts = 4 * trained, rough.cast * trained
    lengths = work.lengths(work.together, work.student, work.split or work.completions)
    again = int(rough.margin * shape.held(lengths, rough.layer)) > bound
    again = again if recompute is None else recompute

    packed = shape.products * options.four_bit
    plain = sum(shape.parameters.values()) - packed - trained * full
    visual = max(work.prompts, work.rows) * (work.student.visual + work.teacher.visual)
    held = {
        "frozen weights": int(plain * rough.frozen + packed * FOUR_BITS),
        "trained weights": gradient,
        "teacher": gradient,
        "optimizer moments": 2 * gradient,
        KEPT_FEATURES: 0 if sees else int(min(room, visual * shape.feature)),
    }
    before = sum(held.values())

    # Sampling: one layer's pass over the prompts, or token steps over keys and values. Both
    # backends hold a small pass in float32 for the gradient.
    prompts = work.lengths(work.sampled, work.student, work.completions)
    (images, _, looks), (graph, _, reads) = (
        _held(shape, options, rows, rough) for rows in prompts[:2]
    )
    kept = item == 4 and work.sampled * work.student.tokens <= PREFILL_TOKENS
    kept = kept and rough.margin * shape.held(prompts[:2], rough.layer) <= bound
    read = work.sampled * shape.cache(work.student.before, item)
    buffer = ROOM << max(0, -(-work.tokens // ROOM) - 1).bit_length()
    grown = prompts[2].count * shape.cache(buffer, item)
    head_copy = rough.head_copy * table
    logits = DRAWN * prompts[2].count * shape.table[0] + head_copy
    rollout = max(read, (images * sees + graph) * kept) + max(looks, reads, grown + logits)

    # The gradient: the head, then the backward of each part, of which the later ones are gone.
    each = [_held(shape, options, rows, rough, again)[:2] for rows in lengths]
    (images, image), (prompt_rows, prompt), (tokens, completion) = each
    before_head = images * sees + prompt_rows + casts * (rough.keeps_casts or not again)
    # Gradients of prompts' keys and values; where gradients are computed together, those add up
    # while completions run.
    keys = work.together * shape.cache(work.student.before, 4 if rough.together else item)
    before_head += keys * bool(rough.together)
    taught = work.lengths(work.together, work.teacher, 1)[:2]
    teacher = max(_held(shape, options, rows, rough)[2] for rows in taught)
    teacher += casts + work.together * shape.cache(work.teacher.before, item)
    chunk, of_head = min(CHUNK_BYTES, 4 * shape.table[0] * lengths[2].total), 4 * table * full
    head = max(rough.head * chunk, 2 * chunk * full + of_head) + head_copy
    # A quarter of a layer's gradient stands for that of its largest parameter.
    layer = gradient // len(shape.text)
    sums = min(layer, rough.together + layer // 4) if rough.together else 0
    summed = gradient * (work.calls > 1)
    late = max(
        summed + tokens + max(head, completion + sums),
        gradient + keys * (not rough.together) + sums + max(completion, prompt),
    )
    largest = 4 * max(map(prod, shape.shapes.values()))
    step = 3 * max(rough.together, largest) if rough.together else 0
    parts = {
        "gradient": gradient,
        "weights in bfloat16": casts,
        "activations": images * sees + prompt_rows + tokens,
        "one layer": max(image * sees, prompt, completion),
        "head chunks": head,
        "key-value cache": read + grown,
        "sampled logits": logits,
    }
    phases = {
        "rollout": before + casts + int(rollout),
        "accumulate": before + int(max(summed + teacher, before_head + late)),
        "apply": before + gradient + min(gradient, step),
    }
    ints = {name: int(size) for name, size in parts.items() if size}
    some = {name: size for name, size in held.items() if size}
    return Memory(some, ints, phases, again, disk=4 * gradient)


def _held(
    shape: Shape, options: ModelOptions, rows: Rows, rough: Footprint, recompute: bool = False
) -> tuple[float, float, float]:
    """Bytes of rows: what is held at the end of a forward; what comes and goes in the backward of
    the widest layer; and what does in a forward that no backward follows.

    With `recompute` each layer's inputs are held, and one layer whole.
    """
    item, layers = options.item, shape.of(rows)
    each = [rough.layer(one, rows) for one in layers]
    forward = PASSING * max(kept for kept, _ in each)
    if rows.kind == "prompts" and not layers[-1].state:
        # The last layer gives of a prompt the keys and values for completions alone.
        each[-1] = (4.0 * item * rows.total * layers[-1].key, 0.0)
    layer = max(kept * recompute + passes for kept, passes in each)
    total = sum(kept for kept, _ in each)
    if recompute:
        total = 1.0 * rough.stream * rows.total * sum(one.width for one in layers)
        total += rows.count * shape.cache(rows.length, item) * (rows.kind == "prompts")
    elif options.adapters and rows.kind != "patches":
        names = chosen_layers(options.adapters, shape.linears)
        adapted = sum(part_of_model(name) == "language" for name in names)
        total += rows.total * item * adapted * options.adapters.rank
    if rows.kind == "completions":
        # The states of recurrences, and the rows that the head reads.
        total += rows.count * shape.cache(0, item) + 12 * rows.total * shape.table[1]
    return total, layer, forward
