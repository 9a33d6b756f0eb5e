"""Memory of one step by part and by phase, in bytes.

Weights, gradients, moments, caches and features are counted exactly. What passes by while a policy
computes is a backend's own rough figure (`opd.planner.Footprint`), and is named so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from opd.models.adapters import part
from opd.plan.shape import Shape, item_of, sees
from opd.plan.work import View, Work, rows
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


@dataclass(frozen=True)
class Activations:
    """What a backward holds of a micro-batch, and what passes by in the backward of one layer."""

    images: float
    prompts: float
    completions: float
    layer: float

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
    full, gradient, (vocabulary, width) = options.adapters is None, 4 * trained, shape.table
    student = activations(shape, options, work, rough, recompute=False)
    again = student.total > rough.recompute_above if recompute is None else recompute
    if again:
        student = activations(shape, options, work, rough, recompute=True)
    held = _held(shape, options, work, rough, room)
    before = sum(held.values())
    casts = rough.cast * (trained - vocabulary * width * (full and not rough.cast_tables))

    def passing(view: View, prompts: int) -> float:
        """The widest layer of a forward without a backward, of the tower or of the prompts."""
        a_token, _, a_patch = rows(shape, rough)
        text, image = view.before * a_token / len(shape.layers), view.patches * a_patch
        return rough.forward * prompts * max(text, image / len(shape.tower))

    # Sampling: one layer's pass over the prompts, or token steps over keys and values.
    chunks, blocks, most, block = rough.head
    copies = rough.head_copy * vocabulary * width
    own = ROOM << max(0, -(-work.tokens // ROOM) - 1).bit_length()
    read = work.sampled * shape.cache(work.student.before, item)
    grown = work.sampled * work.completions * shape.cache(own, item)
    logits = DRAWN * min(work.sampled * work.completions * vocabulary, most // 4) + copies
    # A rollout's pass over its prompts waits for the gradient where it is small.
    alone = replace(
        work, completions=0, teacher=work.student, budget=work.sampled * work.student.tokens
    )
    kept = activations(shape, options, alone, rough, recompute=False).total
    kept *= alone.budget <= rough.keeps_tokens and kept <= rough.recompute_above
    rollout = max(kept, read) + max(passing(work.student, work.sampled), grown + logits)

    # The gradient: the teacher's prompts, the head stage, or the prompts' backward.
    summed, many = gradient * (work.calls > 1), work.count * work.tokens
    chunk = 4 * vocabulary * min(many, max(16, most // (4 * vocabulary)))
    buffers = chunks * chunk + blocks * min(chunk, block) + (1 + full) * copies
    # Hidden states, their gradient, and that of the head.
    states = many * width * 12 + 4 * vocabulary * width * full
    asked, taught = (
        work.together * shape.cache(view.before, item) for view in (work.student, work.teacher)
    )
    served = kept * (work.sampled == work.together == work.prompts)
    accumulate = max(
        summed + served + taught + passing(work.teacher, work.together),
        summed + student.total + states + max(buffers, student.layer),
        gradient + student.images + student.prompts + asked + student.layer,
    )
    parts = {
        "gradient": gradient,
        "weights in bfloat16": casts,
        "activations": student.total,
        "one layer": student.layer,
        "head chunks": buffers + states,
        "key-value cache": read + grown,
        "sampled logits": logits,
    }
    phases = {
        "rollout": before + casts + int(rollout),
        "accumulate": before + casts + int(accumulate),
        "apply": before + gradient + min(gradient, rough.apply),
    }
    ints = {name: int(size) for name, size in parts.items()}
    return Memory(held, ints, phases, again, disk=4 * gradient)


def activations(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, recompute: bool
) -> Activations:
    """What the student's forward holds; with `recompute`, each layer's inputs, and one layer
    whole."""
    view, images, item = work.student, work.together * sees(options), item_of(options)
    many, before = work.count * work.tokens, work.together * view.before
    a_token, a_new, a_patch = rows(shape, rough)
    heads: int = shape.config["text_config"]["num_attention_heads"]
    attend = sum(not layer.recurs for layer in shape.layers)

    def scores(pairs: float) -> float:
        size = rough.score * heads * pairs
        return attend * size * (size <= rough.scores_most)

    windows = [window is not None or rough.copies == "always" for window in shape.windows]
    keys = sum(layer.key * copied for layer, copied in zip(shape.layers, windows, strict=True))
    copied = 2 * item * keys * view.before * (rough.copies != "never")
    vision, prompts = (
        images * view.patches * a_patch,
        before * a_token + scores(before * view.before / 2),
    )
    completed = many * a_new + scores(many * (view.before + work.tokens))
    completed += work.count * (copied + 4 * shape.states)
    layer = max(vision / len(shape.tower), max(prompts, completed) / len(shape.layers))
    if recompute:
        vision = images * view.patches * item * sum(layer.width for layer in shape.tower)
        row = rough.stream * sum(layer.width for layer in shape.layers)
        prompts, completed = (
            before * row + work.together * shape.cache(view.before, item),
            many * row,
        )
    # Inputs and outputs of the projector's products; of completions the states that the head reads.
    merged = 2 * item * sum(size[1] for size in shape.parts["projector"].values() if len(size) == 2)
    return Activations(
        vision + images * view.visual * merged,
        prompts,
        completed + many * shape.table[1] * 12,
        (recompute + rough.backward) * layer,
    )


def _held(
    shape: Shape, options: ModelOptions, work: Work, rough: Footprint, room: float
) -> dict[str, int]:
    trained, full = sum(shape.trained(options).values()), options.adapters is None
    language = (prod(size) for name, size in shape.linears.items() if part(name) == "language")
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
