"""Memory of one step by part and by phase, in bytes.

Weights, gradients, moments, caches and features are counted exactly. The backend estimates what
comes and goes while a policy computes (`opd.planner.Footprint`); such parts are called rough.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from opd.memory import CHUNK_BYTES
from opd.models.adapters import chosen_layers, part_of_model
from opd.plan.work import Step
from opd.planner import Rows

KEPT_FEATURES = "kept image features"
"""A part that grows from step to step up to a bound, if the vision tower is frozen."""

ROUGH = ("activations", "one layer", "head chunks", "sampled logits")
"""Parts that the backend estimates."""

FOUR_BITS = 4.5 / 8  # bytes of a weight, with its share of a scale and an offset for every 64
BUFFER_TOKENS = 64  # of the first buffer of a completion's keys, which doubles when it is full
LOGIT_BYTES = 20  # of a logit that is sampled from
PASSING = 0.45  # the share of a layer's activations in a forward without a backward


@dataclass
class Memory:
    """Parts `held` from step to step; `parts` that come and go; the peaks of all `phases`; bytes of
    a checkpoint on `disk`. `checkpointed`: whether the backward recomputes layers."""

    held: dict[str, int]
    parts: dict[str, int]
    phases: dict[str, int]
    checkpointed: bool
    disk: int

    def __post_init__(self) -> None:
        self.peak = max(self.phases.values())


def memory(step: Step, recompute: bool | None = None) -> Memory:
    """Memory of a step. `recompute` None leaves the choice to the backend's rule.

    On a GPU backends keep the activations that fit in free memory, so the peak is the least that
    they need.
    """
    shape, options, work, rough = step.shape, step.options, step.work, step.rough
    if recompute is None:
        activations = int(rough.margin * shape.held(work.trained(), rough.layer))
        recompute = activations > options.checkpoint_above
    gradient, casts, table = 4 * step.trained, rough.cast * step.trained, prod(shape.table)
    parts = {"gradient": gradient, "weights in bfloat16": casts}

    # From step to step.
    packed = shape.products * options.four_bit
    plain = sum(shape.parameters.values()) - packed - step.trained * step.full
    visual = max(work.prompts, work.rows) * (work.student.visual + work.teacher.visual)
    features = int(min(step.features, visual * shape.feature))
    held = {
        "frozen weights": int(plain * rough.frozen + packed * FOUR_BITS),
        "trained weights": gradient,
        "teacher": gradient,
        "optimizer moments": 2 * gradient,
        KEPT_FEATURES: 0 if options.tunes_features else features,
    }

    # The rollout: one layer's forward over the prompts, or token steps over keys and values.
    *both, completions = work.lengths(work.sampled, work.student, work.completions)
    image, prompt = (_pass(step, rows) for rows in both)
    cache = work.sampled * shape.cache(work.student.before, options.item)
    prefill = float(cache)
    # In float32 backends hold a forward for the gradient whose backward recomputes no layer.
    kept = rough.margin * shape.held(both, rough.layer)
    if options.item == 4 and kept <= options.checkpoint_above:
        prefill = max(cache, image.held * options.tunes_features + prompt.held)
    doublings = max(0, -(-work.tokens // BUFFER_TOKENS) - 1).bit_length()
    buffers = completions.count * shape.cache(BUFFER_TOKENS << doublings, options.item)
    logits = LOGIT_BYTES * completions.count * shape.table[0] + rough.head_copy * table
    sampled = prefill + max(image.forward, prompt.forward, buffers + logits)

    # The gradient of a micro-batch: first the teacher's forward.
    earlier = gradient * (work.calls > 1)  # of the micro-batches before this one
    taught = work.lengths(work.together, work.teacher, 1)[:2]
    teacher = max(_pass(step, rows).forward for rows in taught)
    teacher += casts + work.together * shape.cache(work.teacher.before, options.item)

    # Then the student's forward and the head; then the backward of completions, prompts and images,
    # each of which frees what it held.
    trained = work.trained()
    image, prompt, completion = (_pass(step, rows, recompute) for rows in trained)
    images, layer = (size * options.tunes_features for size in (image.held, image.layer))
    chunk = min(CHUNK_BYTES, 4 * shape.table[0] * trained[2].total)
    head = max(rough.head * chunk, (2 * chunk + 4 * table) * step.full) + rough.head_copy * table
    sums = min(gradient // len(shape.text), rough.together)
    # Gradients of prompts' keys and values add up while completions run if they are computed
    # together.
    item = 4 if rough.together else options.item
    keys = work.together * shape.cache(work.student.before, item)
    early, late = (keys, 0) if rough.together else (0, keys)
    student = images + prompt.held + casts * (rough.keeps_casts or not recompute) + early
    student += max(
        earlier + completion.held + max(head, completion.layer + sums),
        gradient + late + sums + max(completion.layer, prompt.layer),
    )

    # New weights and moments of parameters that are updated together: at least of the largest one.
    largest = 4 * max(map(prod, shape.shapes.values()))
    updated = 3 * max(rough.together, largest) if rough.together else 0
    before = sum(held.values())
    phases = {
        "rollout": before + casts + int(sampled),
        "accumulate": before + int(max(earlier + teacher, student)),
        "apply": before + gradient + min(gradient, updated),
    }
    parts |= {
        "activations": int(images + prompt.held + completion.held),
        "one layer": int(max(layer, prompt.layer, completion.layer)),
        "head chunks": int(head),
        "key-value cache": int(cache + buffers),
        "sampled logits": int(logits),
    }
    held, parts = ({name: size for name, size in some.items() if size} for some in (held, parts))
    return Memory(held, parts, phases, recompute, disk=4 * gradient)


class _Pass(NamedTuple):
    """Bytes of rows: `held` at the end of a forward; `layer`: those that come and go in the
    backward of the widest layer; `forward`: in a forward that no backward follows."""

    held: float
    layer: float
    forward: float


def _pass(step: Step, rows: Rows, recompute: bool = False) -> _Pass:
    """Rows run through their layers. With `recompute` the inputs of each layer are held, and one
    layer whole."""
    shape, options, item = step.shape, step.options, step.options.item
    layers = shape.layers(rows)
    each = [step.rough.layer(layer, rows) for layer in layers]
    forward = PASSING * max(held for held, _ in each)
    if rows.kind == "prompts" and not layers[-1].state:
        # The last layer computes only keys and values of a prompt, for its completions.
        each[-1] = (4.0 * item * rows.total * layers[-1].key, 0.0)
    widest = max(held * recompute + passes for held, passes in each)
    total = sum(held for held, _ in each)
    if recompute:
        total = 1.0 * step.rough.stream * rows.total * sum(layer.width for layer in layers)
        total += rows.count * shape.cache(rows.length, item) * (rows.kind == "prompts")
    elif options.adapters and rows.kind != "patches":
        names = chosen_layers(options.adapters, shape.linears)
        adapted = sum(part_of_model(name) == "language" for name in names)
        total += rows.total * item * adapted * options.adapters.rank
    if rows.kind == "completions":
        # The states of recurrences, and the rows that the head reads.
        total += rows.count * shape.cache(0, item) + 12 * rows.total * shape.table[1]
    return _Pass(total, widest, forward)
