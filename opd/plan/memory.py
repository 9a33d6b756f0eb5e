"""Memory of one step by part and by phase, as the two backends hold it, in bytes. Every factor says what it counts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from opd.plan.activations import FLOAT, KEPT_BYTES, Setting, activations, delta_bytes, handed_bytes, passing_scores
from opd.plan.shape import Delta, Layer, Shape, Tune
from opd.plan.work import KNOWN_BYTES, View, Work

FOUR_BITS = 4.5 / 8
"""Bytes of a 4-bit weight with its share of a scale and an offset of 16 bits each for every 64 weights."""

CHECKPOINT_ABOVE = 2 * 2**30
"""Estimated bytes of activations above which the backends compute layers again (`forward.py` of both)."""

CHUNK_BYTES = 64 * 2**20
"""A float32 array of logits in the head stage (`objective.py` of both)."""

PREFILL_TOKENS = 16384
"""Tokens of prompts whose pass in the rollout is kept for the gradient (`sampling.py` of both)."""

ROOM = 64
"""Tokens of torch's first buffer of a completion's keys, which doubles when it is full (`attention.py`)."""


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
    """Memory of a step; `checkpointed` None leaves the choice to the backends' own rule."""
    again = estimate(shape, work, setting) > CHECKPOINT_ABOVE if checkpointed is None else checkpointed
    trained = sum(tune.trained(shape).values())
    student = activations(shape, tune, work, setting, again)
    held = _held(shape, tune, work, setting)
    casts = _casts(shape, tune, setting)
    cache = _cache(shape, work, setting)
    logits = _sampled(shape, tune, work, setting)
    head = _head(shape, tune, work, setting, top_k)
    gradient = FLOAT * trained
    # What earlier micro-batches summed stays whole until a micro-batch's own gradient is.
    sums = 0 if work.calls == 1 else gradient
    # Of completions a few at a time: their sum, and what they ask of the prompts' keys and values.
    asked = 0 if not work.split else gradient + work.together * _kept(shape, work.student.before, setting)
    teacher = casts + _passing(shape, work, setting, work.teacher, work.together)
    forward = student.total + (0 if again and not setting.mlx else casts) + head
    # Between the completions' backward and the prompts', the layers' gradients stand beside the prompts' activations.
    layers = _layers(shape, tune) * (setting.item if not setting.mlx else FLOAT)
    middle = student.prompts + student.vision + student.passing[1] + layers + _head_gradient(shape, tune) + (0 if again else casts)
    last = student.vision + gradient + _head_gradient(shape, tune) + student.passing[0] * again
    end = gradient + _head_gradient(shape, tune)
    before = sum(held.values())
    room = max(shape.embedding, shape.hidden * shape.intermediate) * FLOAT if tune.full else 0
    accumulate = max(teacher, asked + forward + student.passing[2] * (again or setting.mlx), middle, last, end)
    prefill = casts + _passing(shape, work, setting, work.student, work.sampled)
    return Memory(
        held=held,
        parts={
            "gradient": gradient + sums,
            "weights in bfloat16": casts,
            "activations": student.total,
            "one layer again" if again else "one layer's backward": max(student.passing),
            "head chunks": head,
            "key-value cache": cache,
            "sampled logits": logits,
        },
        phases={
            "rollout": before + _remembered(shape, tune, work, setting) + max(prefill, casts + cache + logits),
            "accumulate": before + sums + accumulate,
            "apply": before + gradient + (gradient if setting.mlx else 2 * room),
        },
        checkpointed=again,
        disk=4 * FLOAT * trained,
    )


def estimate(shape: Shape, work: Work, setting: Setting) -> int:
    """The backends' own rough count of activations, on which they decide whether to compute layers again (`activation_bytes`)."""
    v, view, prompts, query = shape.vision, work.student, work.together, shape.attention.query
    rows, depth = (work.split or work.completions) * work.tokens, len(shape.layers)
    if setting.mlx:
        a_row = 6 * shape.hidden + 3 * shape.intermediate + 6 * query
        scores = FLOAT * shape.attention.heads * prompts * (view.before**2 + rows * (view.before + work.tokens))
        text = depth * (setting.item * prompts * a_row * (view.before + rows) + min(scores, 2 * KEPT_BYTES))
        a_patch = 10 * v.hidden + 3 * v.intermediate
        return text + v.layers * prompts * (setting.item * view.patches * a_patch + min(FLOAT * v.heads * view.pairs(), KEPT_BYTES))
    a_row = 12 * shape.hidden + 4 * shape.intermediate + 8 * query
    a_patch = 16 * v.hidden + 4 * v.intermediate
    return setting.item * prompts * (depth * (view.before + rows) * a_row + v.layers * view.patches * a_patch)


def _held(shape: Shape, tune: Tune, work: Work, setting: Setting) -> dict[str, int]:
    counts, trained = shape.parameters, sum(tune.trained(shape).values())
    if tune.full:
        # torch keeps a frozen tower in float32, MLX in the type of computation.
        frozen = (sum(counts.values()) - trained) * (setting.item if setting.mlx else FLOAT)
    else:
        layers = shape.weights if tune.kind == "qlora" else 0
        frozen = int((sum(counts.values()) - layers) * setting.item + layers * FOUR_BITS)
    visual = work.prompts * (work.student.visual + work.teacher.visual)
    known = min(KNOWN_BYTES, FLOAT * visual * shape.hidden * (1 + shape.vision.taps)) if not tune.sees else 0
    parts = {
        "frozen weights": frozen,
        "trained weights": FLOAT * trained,
        "teacher": FLOAT * trained,
        "optimizer moments": 2 * FLOAT * trained,
        "image features": known,
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


def _head_gradient(shape: Shape, tune: Tune) -> int:
    """The head's own gradient, until it is added to what came through the embedding."""
    return FLOAT * shape.embedding if tune.full else 0


def _remembered(shape: Shape, tune: Tune, work: Work, setting: Setting) -> int:
    """A rollout's pass over its prompts, kept for the gradient where it is small and in the parameters' own precision."""
    alone = replace(work.limited(work.sampled), completions=0)
    small = work.sampled * work.student.tokens <= PREFILL_TOKENS and estimate(shape, alone, setting) <= CHECKPOINT_ABOVE
    if setting.half or not small:
        return 0
    student = activations(shape, tune, work.limited(work.sampled), setting, again=False)
    return student.vision + student.prompts


def _kept(shape: Shape, tokens: int, setting: Setting) -> int:
    """What all layers keep of `tokens` tokens that run one after the other: keys and values, or states."""
    return sum(count * handed_bytes(layer, tokens, setting) for layer, count in shape.kinds.items())


def _cache(shape: Shape, work: Work, setting: Setting) -> int:
    """What every layer keeps: of prompts once, of completions in buffers."""
    room = work.tokens
    if not setting.mlx:
        room = ROOM
        while room < work.tokens:
            room *= 2
    return work.sampled * (_kept(shape, work.student.before, setting) + work.completions * _kept(shape, room, setting))


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


def _head(shape: Shape, tune: Tune, work: Work, setting: Setting, top_k: int) -> int:
    """The head stage: chunk buffers, both policies' heads where they are cast, and the gradients of head and hidden states."""
    rows = work.together * (work.split or work.completions) * work.tokens
    chunk = FLOAT * shape.vocabulary * min(rows, max(16, CHUNK_BYTES // (FLOAT * shape.vocabulary)))
    # Counted by tests/test_torch_memory.py and tests/test_mlx_memory.py.
    buffers = 10 if setting.mlx else 4 if not top_k or top_k >= shape.vocabulary else 3.2
    heads = (1 + tune.full) * shape.embedding * _head_copy(tune, setting)
    states = rows * shape.hidden * (2 * setting.item + FLOAT)
    return int(buffers * chunk) + heads + states + _head_gradient(shape, tune)


def _passing(shape: Shape, work: Work, setting: Setting, view: View, prompts: int) -> int:
    """A forward without a backward over `prompts` prompts seen as `view`: what all layers keep, and the widest layer passing by."""
    v = shape.vision
    rows = max(_forward(shape, layer, view.before, setting) for layer in shape.kinds)
    patch = v.hidden * 6 * FLOAT + (2 + v.gated) * v.intermediate * setting.item
    # MLX without its fused kernel: scores, less their largest, exponentials; of a block.
    scores = setting.mlx * (not setting.gpu) * passing_scores(4 * FLOAT * v.heads * view.pairs(), setting)
    return prompts * max(_kept(shape, view.before, setting) + rows, view.patches * patch + scores)


def _forward(shape: Shape, layer: Layer, before: int, setting: Setting) -> int:
    """A layer passing by without a backward: rows, three feed-forward arrays, and scores; or what the delta rule solves."""
    if isinstance(layer, Delta):
        # As counted; MLX frees its triangle's rows as it goes, torch little before the layer ends.
        return delta_bytes(Tune(), layer, before, setting) // 4 * (2 if setting.mlx else 3)
    row = 3 * shape.intermediate * setting.item + 3 * shape.hidden * FLOAT
    scores = setting.mlx * (not setting.gpu) * passing_scores(4 * FLOAT * layer.heads * before**2, setting)
    return before * row + scores
