"""Memory of one step by part and by phase, as the two backends hold it, in bytes. Every factor says what it counts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain

from opd.plan.activations import (
    CHUNK,
    FLOAT,
    KEPT_BYTES,
    SEGMENT,
    Setting,
    activations,
    delta_bytes,
    delta_held,
    handed_bytes,
    passing_scores,
)
from opd.plan.shape import Delta, Layer, Shape, Tune
from opd.plan.work import View, Work

KEPT_FEATURES = "kept image features"
"""A part that is held where the vision tower is frozen. It grows from step to step up to a bound, `Setting.features`."""

FOUR_BITS = 4.5 / 8
"""Bytes of a 4-bit weight with its share of a scale and an offset of 16 bits each for every 64 weights."""

CHECKPOINT_ABOVE = 2 * 2**30
"""Estimated bytes of activations above which the backends compute layers again (`forward.py` of both)."""

CHUNK_BYTES = 64 * 2**20
"""A float32 array of logits in the head stage (`objective.py` of both)."""

BLOCK_BYTES = 2**20
"""An array of the rows that go through the head stage together on a CPU (`objective.py` of both)."""

PREFILL_TOKENS = 16384
"""Tokens of prompts whose pass in the rollout is kept for the gradient (`sampling.py` of both)."""

ROOM = 64
"""Tokens of the first buffer of a completion's keys, which doubles when it is full (`attention.py` of both)."""

TOGETHER = 2**24
"""Bytes of parameters whose gradient, or step, MLX computes at a time (`gradient.py`)."""


@dataclass(frozen=True)
class Memory:
    """`held`: parts that live from step to step. `phases`: the largest sum of bytes in each. `parts`: what comes and goes, by name."""

    held: dict[str, int]
    parts: dict[str, int]
    phases: dict[str, int]
    checkpointed: bool
    disk: int

    @property
    def peak(self) -> int:
        """The largest of all phases."""
        return max(self.phases.values())


def memory(shape: Shape, tune: Tune, work: Work, setting: Setting, top_k: int = 100, checkpointed: bool | None = None) -> Memory:
    """Memory of a step; `checkpointed` None leaves the choice to the backends' own rule.

    On a GPU the backends keep the activations that fit in what is free then, so the peak is the least they need, and the time the most.
    """
    again = estimate(shape, work, setting) > CHECKPOINT_ABOVE if checkpointed is None else checkpointed
    trained = sum(tune.trained(shape).values())
    student = activations(shape, tune, work, setting, again)
    held = _held(shape, tune, work, setting)
    casts = _casts(shape, tune, setting)
    logits = _sampled(shape, tune, work, setting)
    head = _head(shape, tune, work, setting, top_k)
    gradient = FLOAT * trained
    before = sum(held.values())
    remembered = _remembered(shape, tune, work, setting)
    read, own = work.sampled * _kept(shape, work.student.before, setting), _cache(shape, work, setting)
    # A pass that is remembered holds the prompts' keys already.
    kept = remembered or read
    return Memory(
        held=held,
        parts={
            "gradient": gradient,
            "weights in bfloat16": casts,
            "activations": student.total,
            "one layer again" if again else "one layer's backward": max(student.passing),
            "head chunks": sum(head),
            "key-value cache": read + own,
            "sampled logits": logits,
        },
        phases={
            "rollout": before + casts + max(_passing(shape, work.student, setting, work.sampled, kept), kept + own + logits),
            "accumulate": before + _accumulate(shape, tune, work, setting, head, again),
            # torch's optimizer works in place, MLX's makes arrays anew, some at a time.
            "apply": before + gradient + min(gradient, 3 * max(TOGETHER, _largest(shape, tune))) * setting.mlx,
        },
        checkpointed=again,
        disk=4 * FLOAT * trained,
    )


def _accumulate(shape: Shape, tune: Tune, work: Work, setting: Setting, head: tuple[int, int], again: bool) -> int:
    """The largest sum of bytes while a micro-batch is differentiated, the last of a step; `head` is `_head`'s."""
    student, casts, (buffers, found) = activations(shape, tune, work, setting, again), _casts(shape, tune, setting), head
    gradient, layers = FLOAT * sum(tune.trained(shape).values()), FLOAT * _layers(shape, tune) + FLOAT * shape.embedding * tune.full
    # What earlier micro-batches summed is there from the start, and this one adds to it.
    summed = gradient * (work.calls > 1)
    slopes = _slopes(shape, tune, setting)
    remembered = _remembered(shape, tune, work, setting)
    if served := bool(remembered) and work.sampled == work.together == work.prompts:
        # The rollout's pass over just these prompts serves them, even where the layers of completions run again.
        whole = activations(shape, tune, work, setting, again=False)
        student = replace(student, vision=whole.vision, prompts=whole.prompts, passing=(*whole.passing[:2], student.passing[2]))
    # Keys and values of the prompts, and what completions ask of them. MLX sums that in float32, in a buffer that is there from the start.
    kept, asked = (work.together * _kept(shape, work.student.before, one) for one in (setting, _summed(setting)))
    taught = work.together * _kept(shape, work.teacher.before, setting)
    prompts = asked * setting.mlx + student.vision + student.prompts + (0 if again and not setting.mlx else casts)
    # Of completions a few at a time: what earlier ones summed, and asked.
    earlier = max(summed, layers) + asked if work.split else summed
    # What one layer's backward needs, and a gradient that is added: on torch, where a weight's is made, few of the layer's own are left.
    prompt, completion = (
        passing + added if setting.mlx else max(passing, added)
        for passing, added in zip(student.passing[1:], (slopes, slopes * bool(work.split or summed)), strict=True)
    )
    text = max(summed, layers)
    rest = 0 if setting.mlx else kept + asked
    return max(
        # The teacher's prompts.
        summed + served * remembered + casts + _passing(shape, work.teacher, setting, work.together, taught),
        # The head stage, and where the completions' backward begins.
        prompts + earlier + student.completions + found + max(buffers, completion),
        # Where it ends: one layer of theirs is left, and the head and all layers have gradients.
        prompts + text + asked + completion + (0 if again else student.completions // len(shape.layers)),
        # Where the prompts' backward begins, and where the tower's does.
        prompts + text + prompt + (0 if setting.mlx else asked),
        rest + student.vision + text + max(student.passing[0], slopes),
        rest + gradient,
    )


def estimate(shape: Shape, work: Work, setting: Setting) -> int:
    """The backends' own rough count of activations, on which they decide whether to compute layers again (`activation_bytes`)."""
    v, view, prompts, query = shape.vision, work.student, work.together, shape.attention.query
    rows, depth = (work.split or work.completions) * work.tokens, len(shape.layers)
    deltas = [layer for layer in shape.layers if isinstance(layer, Delta)]
    attends, tokens = depth - len(deltas), view.before + rows
    if setting.mlx:
        scores = min(FLOAT * shape.attention.heads * prompts * (view.before**2 + rows * (view.before + work.tokens)), 2 * KEPT_BYTES)
        text = prompts * tokens * (depth * (6 * shape.hidden + 3 * shape.intermediate) + attends * 6 * query)
        a_patch = 10 * v.hidden + 3 * v.intermediate
        images = v.layers * prompts * (setting.item * view.patches * a_patch + min(FLOAT * v.heads * view.pairs(), KEPT_BYTES))
        states = sum(_estimated(one, view.before) + rows // work.tokens * _estimated(one, work.tokens) for one in deltas)
        return setting.item * text + attends * scores + images + prompts * states
    text = tokens * (depth * (12 * shape.hidden + 4 * shape.intermediate) + attends * 8 * query)
    a_patch = 16 * v.hidden + 4 * v.intermediate
    found = setting.item * (text + v.layers * view.patches * a_patch)
    return prompts * (found + sum(tokens * _estimated(one, 0, setting.item) for one in deltas))


def _estimated(layer: Delta, length: int, item: int = 0) -> int:
    """The backends' own count of a delta net (`delta_bytes` of their `forward.py`): of a token in torch's `item`, of `length` in MLX."""
    keys, states = layer.value_heads * layer.key_dim, 2 * layer.state // CHUNK
    if item:
        return item * 3 * layer.channels + FLOAT * (9 * keys + 9 * layer.values + 6 * layer.value_heads * CHUNK + states)
    solved = 6 * keys + 3 * layer.values + layer.value_heads * CHUNK * (8 + CHUNK // 2) + states if length <= SEGMENT else 0
    return FLOAT * length * (4 * layer.channels + 4 * layer.values + solved)


def _held(shape: Shape, tune: Tune, work: Work, setting: Setting) -> dict[str, int]:
    counts, trained = shape.parameters, sum(tune.trained(shape).values())
    if tune.full:
        # torch keeps a frozen tower in float32, MLX in the type of computation.
        frozen = (sum(counts.values()) - trained) * (setting.item if setting.mlx else FLOAT)
    else:
        layers = shape.weights if tune.kind == "qlora" else 0
        frozen = int((sum(counts.values()) - layers) * setting.item + layers * FOUR_BITS)
    visual = max(work.prompts, work.rows) * (work.student.visual + work.teacher.visual)
    known = min(setting.features, FLOAT * visual * shape.hidden * (1 + shape.vision.taps)) if not tune.sees else 0
    parts = {
        "frozen weights": frozen,
        "trained weights": FLOAT * trained,
        "teacher": FLOAT * trained,
        "optimizer moments": 2 * FLOAT * trained,
        KEPT_FEATURES: known,
    }
    return {name: size for name, size in parts.items() if size}


def _casts(shape: Shape, tune: Tune, setting: Setting) -> int:
    """The trained weights once more in bfloat16, while a policy computes; torch looks tokens up in float32."""
    trained = sum(tune.trained(shape).values())
    if not setting.half or not tune.full:
        return 0
    return setting.item * (trained if setting.mlx else trained - shape.embedding)


def _layers(shape: Shape, tune: Tune) -> int:
    """Trained parameters of the language model's layers."""
    return shape.weights if tune.full else sum(tune.trained(shape).values())


def _slopes(shape: Shape, tune: Tune, setting: Setting) -> int:
    """Gradients that are added to their sums at a time: torch, one; MLX, some of a layer's (`add`)."""

    def pieces(layer: Layer) -> int:
        linears = shape.linears(layer).values() if tune.full else tune.adapted(shape, layer)
        each = [FLOAT * (i * o if tune.full else tune.rank * (i + o)) for i, o in linears]
        return min(sum(each), TOGETHER * setting.mlx + max(each, default=0))

    return max(map(pieces, shape.kinds))


def _largest(shape: Shape, tune: Tune) -> int:
    """The largest trained parameter."""
    linears = chain.from_iterable(shape.linears(layer).values() for layer in shape.kinds)
    return FLOAT * max(shape.embedding * tune.full, *(i * o if tune.full else tune.rank * max(i, o) for i, o in linears))


def _summed(setting: Setting) -> Setting:
    """In which type of number gradients to the prompts' keys are added up."""
    return replace(setting, half=False) if setting.mlx else setting


def _remembered(shape: Shape, tune: Tune, work: Work, setting: Setting) -> int:
    """A rollout's pass over its prompts, kept for the gradient where it is small and in the parameters' own precision."""
    alone = replace(work.limited(work.sampled), completions=0)
    small = work.sampled * work.student.tokens <= PREFILL_TOKENS and estimate(shape, alone, setting) <= CHECKPOINT_ABOVE
    if setting.half or not small:
        return 0
    student = activations(shape, tune, work.limited(work.sampled), setting, again=False)
    starts = _kept(shape, work.student.before, setting) if setting.mlx else 0
    return student.vision + student.prompts + work.sampled * starts


def _kept(shape: Shape, tokens: int, setting: Setting) -> int:
    """What all layers keep of `tokens` tokens that run one after the other: keys and values, or states."""
    return sum(count * handed_bytes(layer, tokens, setting) for layer, count in shape.kinds.items())


def _cache(shape: Shape, work: Work, setting: Setting) -> int:
    """What every layer keeps of completions, in buffers that double."""
    room = ROOM
    while room < work.tokens:
        room *= 2
    return work.sampled * work.completions * _kept(shape, room, setting)


def _sampled(shape: Shape, tune: Tune, work: Work, setting: Setting) -> int:
    """Logits of a token step and what drawing from them takes, and the head in the products' type."""
    rows = min(work.sampled * work.completions, max(16, CHUNK_BYTES // (FLOAT * shape.vocabulary)))
    # torch: logits, log-probabilities, probabilities, and their sum in float64. MLX: as many, the sum in float32, and two masks.
    drawn = 20 * rows * shape.vocabulary
    return drawn + shape.embedding * _head_copy(tune, setting)


def _head_copy(tune: Tune, setting: Setting) -> int:
    """Bytes of a head's weight in the copies that its products take: in half precision, from a trained head; in float32, off a GPU."""
    if not setting.half:
        return 0
    if setting.mlx:
        return FLOAT * (not tune.full)
    return setting.item * tune.full + FLOAT * (not setting.gpu)


def _head(shape: Shape, tune: Tune, work: Work, setting: Setting, top_k: int) -> tuple[int, int]:
    """The head stage: chunk buffers with both policies' heads where they are cast; and hidden states, their gradient and the head's."""
    rows = work.together * (work.split or work.completions) * work.tokens
    most = max(16, CHUNK_BYTES // (FLOAT * shape.vocabulary))
    chunk = FLOAT * shape.vocabulary * min(rows, most)
    some = 0 < top_k < shape.vocabulary
    block = chunk if setting.gpu else min(chunk, BLOCK_BYTES)
    # Counted by tests/test_torch_memory.py and tests/test_mlx_memory.py.
    if not setting.mlx:
        buffers = 2 * chunk + (1.2 if some else 2) * block
    else:
        buffers = 3 * chunk + (5 if some else 8) * block if block < chunk else (7 if some else 9) * chunk
        if tune.full:
            # The first chunk's gradient to the head is made after its buffers, and every later one beside the sum before it.
            table, later = FLOAT * shape.embedding, rows > most
            buffers = max(buffers - table * (not later), 2 * chunk + table * later)
    heads = (1 + tune.full) * shape.embedding * _head_copy(tune, setting)
    states = rows * shape.hidden * (2 * setting.item + FLOAT)
    return int(buffers) + heads, states + FLOAT * shape.embedding * tune.full


def _passing(shape: Shape, view: View, setting: Setting, prompts: int, kept: int) -> int:
    """A forward over `prompts` prompts seen as `view`: what all layers have `kept`, and the widest passing by; or, before them, the
    tower's."""
    v = shape.vision
    rows = max(_forward(shape, layer, view.before, setting) for layer in shape.kinds)
    patch = v.hidden * 6 * FLOAT + (2 + v.gated) * v.intermediate * setting.item
    # MLX without its fused kernel: scores, less their largest, exponentials; of a block.
    scores = setting.mlx * (not setting.gpu) * passing_scores(4 * FLOAT * v.heads * view.pairs(), setting)
    return max(kept + prompts * rows, prompts * (view.patches * patch + scores))


def _forward(shape: Shape, layer: Layer, before: int, setting: Setting) -> int:
    """A layer passing by without a backward: rows, three feed-forward arrays, and scores; or what the delta rule solves."""
    if isinstance(layer, Delta):
        if not setting.mlx:
            # As counted, here and below: torch frees little before the layer ends, MLX its triangle's rows as it goes.
            return delta_bytes(Tune(), layer, before, setting) // 4 * 3
        found = delta_held(Tune(), layer, before, setting) if before > SEGMENT else 0
        return found + delta_bytes(Tune(), layer, min(before, SEGMENT), setting) // 2
    row = 3 * shape.intermediate * setting.item + 3 * shape.hidden * FLOAT
    scores = setting.mlx * (not setting.gpu) * passing_scores(4 * FLOAT * layer.heads * before**2, setting)
    return before * row + scores
