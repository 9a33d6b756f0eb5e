"""Memory of one step by part and by phase, in bytes.

Weights, gradients, moments, caches and features are counted exactly. The backend estimates what
comes and goes while a policy computes (`opd.planner.Footprint`); such parts are called rough.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import NamedTuple, TypeAlias

from opd.memory import CHUNK_BYTES
from opd.models.adapters import chosen_layers, part_of_model
from opd.models.shape import Shape
from opd.plan.work import Work
from opd.planner import Footprint, Rows
from opd.types import ModelOptions

KEPT_FEATURES = "kept image features"
"""A part that grows from step to step up to a bound, if the vision tower is frozen."""

ROUGH = ("activations", "one layer", "head chunks", "sampled logits")
"""Parts that the backend estimates."""

FOUR_BITS = 4.5 / 8
"""Bytes of a 4-bit weight, with its share of a scale and an offset for every 64 weights."""

BUFFER_TOKENS, LOGIT_BYTES = 64, 20
"""Tokens of the first buffer of a completion's keys, which doubles when it is full; bytes of a
logit that is sampled from."""

PASSING = 0.45
"""The share of a layer's activations that come and go in a forward without a backward."""

Peak: TypeAlias = tuple[float, dict[str, float]]
"""The most bytes that a phase needs above those held from step to step, and its parts."""


@dataclass(frozen=True)
class Memory:
    """Parts `held` from step to step; `parts` that come and go; the peaks of all `phases`; bytes of
    a checkpoint on `disk`. `checkpointed`: whether the backward recomputes layers."""

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
    most_features: float,
    recompute: bool | None = None,
) -> Memory:
    """Memory of a step. `most_features`: the most bytes of a frozen tower's features that are kept.
    `recompute` None leaves the choice to the backend's rule.

    On a GPU backends keep the activations that fit in free memory, so the peak is the least that
    they need.
    """
    if recompute is None:
        activations = int(rough.margin * shape.held(work.trained(), rough.layer))
        recompute = activations > options.checkpoint_above
    trained, full = sum(shape.trained(options).values()), options.adapters is None
    gradient, casts = 4 * trained, rough.cast * trained
    packed = shape.products * options.four_bit
    plain = sum(shape.parameters.values()) - packed - trained * full
    visual = max(work.prompts, work.rows) * (work.student.visual + work.teacher.visual)
    features = int(min(most_features, visual * shape.feature))
    held = {
        "frozen weights": int(plain * rough.frozen + packed * FOUR_BITS),
        "trained weights": gradient,
        "teacher": gradient,
        "optimizer moments": 2 * gradient,
        KEPT_FEATURES: 0 if options.tunes_features else features,
    }
    sampled, sampling = _rollout(shape, options, work, rough)
    differentiated, training = _accumulate(shape, options, work, rough, recompute)
    # New weights and moments of parameters that are updated together: at least of the largest one.
    largest = 4 * max(map(prod, shape.shapes.values()))
    updated = 3 * max(rough.together, largest) if rough.together else 0
    parts = {"gradient": gradient, "weights in bfloat16": casts, **training, **sampling}
    before = sum(held.values())
    phases = {
        "rollout": before + casts + int(sampled),
        "accumulate": before + int(differentiated),
        "apply": before + gradient + min(gradient, updated),
    }
    return Memory(
        {name: size for name, size in held.items() if size},
        {name: int(size) for name, size in parts.items() if size},
        phases,
        recompute,
        disk=4 * gradient,
    )


def _rollout(shape: Shape, options: ModelOptions, work: Work, rough: Footprint) -> Peak:
    """Sampling: one layer's forward over the prompts, or token steps over keys and values."""
    *prompts, completions = work.lengths(work.sampled, work.student, work.completions)
    image, prompt = (_pass(shape, options, rough, rows) for rows in prompts)
    cache = work.sampled * shape.cache(work.student.before, options.item)
    prefill = float(cache)
    # In float32 backends hold a forward for the gradient whose backward recomputes no layer.
    held = rough.margin * shape.held(prompts, rough.layer)
    if options.item == 4 and held <= options.checkpoint_above:
        prefill = max(cache, image.held * options.tunes_features + prompt.held)
    doublings = max(0, -(-work.tokens // BUFFER_TOKENS) - 1).bit_length()
    buffers = completions.count * shape.cache(BUFFER_TOKENS << doublings, options.item)
    logits = LOGIT_BYTES * completions.count * shape.table[0] + rough.head_copy * prod(shape.table)
    peak = prefill + max(image.forward, prompt.forward, buffers + logits)
    return peak, {"key-value cache": cache + buffers, "sampled logits": logits}


def _accumulate(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, recompute: bool
) -> Peak:
    """The gradient of a micro-batch: the teacher's forward; the student's forward and the head;
    then the backward of completions, prompts and images, each of which frees what it held."""
    full, table = options.adapters is None, prod(shape.table)
    trained = sum(shape.trained(options).values())
    gradient, casts = 4 * trained, rough.cast * trained
    earlier = gradient * (work.calls > 1)  # of the micro-batches before this one
    taught = work.lengths(work.together, work.teacher, 1)[:2]
    teacher = max(_pass(shape, options, rough, one).forward for one in taught)
    teacher += casts + work.together * shape.cache(work.teacher.before, options.item)

    rows = work.trained()
    image, prompt, completion = (_pass(shape, options, rough, one, recompute) for one in rows)
    images, layer = (size * options.tunes_features for size in (image.held, image.layer))
    chunk = min(CHUNK_BYTES, 4 * shape.table[0] * rows[2].total)
    head = max(rough.head * chunk, (2 * chunk + 4 * table) * full) + rough.head_copy * table
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
    return max(earlier + teacher, student), {
        "activations": images + prompt.held + completion.held,
        "one layer": max(layer, prompt.layer, completion.layer),
        "head chunks": head,
    }


class _Pass(NamedTuple):
    """Bytes of rows: `held` at the end of a forward; `layer`: those that come and go in the
    backward of the widest layer; `forward`: in a forward that no backward follows."""

    held: float
    layer: float
    forward: float


def _pass(
    shape: Shape, options: ModelOptions, rough: Footprint, rows: Rows, recompute: bool = False
) -> _Pass:
    """Rows run through their layers. With `recompute` the inputs of each layer are held, and one
    layer whole."""
    item, layers = options.item, shape.layers(rows)
    each = [rough.layer(layer, rows) for layer in layers]
    forward = PASSING * max(held for held, _ in each)
    if rows.kind == "prompts" and not layers[-1].state:
        # The last layer computes only keys and values of a prompt, for its completions.
        each[-1] = (4.0 * item * rows.total * layers[-1].key, 0.0)
    widest = max(held * recompute + passes for held, passes in each)
    total = sum(held for held, _ in each)
    if recompute:
        total = 1.0 * rough.stream * rows.total * sum(layer.width for layer in layers)
        total += rows.count * shape.cache(rows.length, item) * (rows.kind == "prompts")
    elif options.adapters and rows.kind != "patches":
        names = chosen_layers(options.adapters, shape.linears)
        adapted = sum(part_of_model(name) == "language" for name in names)
        total += rows.total * item * adapted * options.adapters.rank
    if rows.kind == "completions":
        # The states of recurrences, and the rows that the head reads.
        total += rows.count * shape.cache(0, item) + 12 * rows.total * shape.table[1]
    return _Pass(total, widest, forward)
