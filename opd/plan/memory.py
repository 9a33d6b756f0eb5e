"""Memory of one step by part and by phase, as the two backends hold it, in bytes. Every factor says what it counts.

Activations are those that `backends/*/attention.py` and `vision.py` keep for a backward, tensor by tensor; rows of a micro-batch are
taken to be of one length, as the planned lengths are.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd.plan.shape import Shape, Tune
from opd.plan.work import KNOWN_BYTES, View, Work

FLOAT = 4
"""Bytes of a float32."""

FOUR_BITS = 4.5 / 8
"""Bytes of a 4-bit weight with its share of a scale and an offset of 16 bits each for every 64 weights."""

CHECKPOINT_ABOVE = 2 * 2**30
"""Estimated bytes of activations above which the backends compute layers again (`forward.py` of both)."""

CHUNK_BYTES = 64 * 2**20
"""A float32 array of logits in the head stage (`objective.py` of both)."""

ROOM = 64
"""Tokens of torch's first buffer of a completion's keys, which doubles when it is full (`attention.py`)."""


@dataclass(frozen=True)
class Setting:
    """How a backend computes: `mlx`, else torch; on a `gpu` products take half precision as it is; `half` is bfloat16."""

    mlx: bool
    gpu: bool
    half: bool

    @property
    def item(self) -> int:
        """Bytes of a number in computation."""
        return 2 if self.half else FLOAT


@dataclass(frozen=True)
class Activations:
    """What a backward holds of a micro-batch's tower, prompts and completions; `passing` is one layer's backward of each."""

    vision: int
    prompts: int
    completions: int
    passing: tuple[int, int, int]

    @property
    def total(self) -> int:
        """All that is held at the end of the forward."""
        return self.vision + self.prompts + self.completions


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
    teacher = casts + _passing(shape, work, setting, work.teacher)
    forward = student.total + (0 if again and not setting.mlx else casts) + head
    # Between the completions' backward and the prompts', the layers' gradients stand beside the prompts' activations.
    layers = _layers(shape, tune) * (setting.item if not setting.mlx else FLOAT)
    middle = student.prompts + student.vision + student.passing[1] + layers + _head_gradient(shape, tune) + (0 if again else casts)
    last = student.vision + gradient + _head_gradient(shape, tune) + student.passing[0] * again
    end = gradient + _head_gradient(shape, tune)
    before = sum(held.values())
    room = max(shape.embedding, shape.hidden * shape.intermediate) * FLOAT if tune.full else 0
    accumulate = max(teacher, forward + student.passing[2] * (again or setting.mlx), middle, last, end)
    prefill = casts + _passing(shape, work, setting, work.student)
    # torch keeps a small rollout's pass over its prompts for the gradient, where no casts and no adapters are.
    kept = 0 if again or setting.mlx or setting.half or not tune.full else student.prompts + student.vision
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
            "rollout": before + max(prefill, casts + cache + logits + kept),
            "accumulate": before + sums + accumulate,
            "apply": before + gradient + (gradient if setting.mlx else 2 * room),
        },
        checkpointed=again,
        disk=4 * FLOAT * trained,
    )


def estimate(shape: Shape, work: Work, setting: Setting) -> int:
    """The backends' own rough count of activations, on which they decide whether to compute layers again (`activation_bytes`)."""
    v, prompts = shape.vision, work.together
    before, rows = work.student.tokens - 1, work.completions * work.tokens
    if setting.mlx:
        a_row = 6 * shape.hidden + 3 * shape.intermediate + 6 * shape.query
        scores = 2 * shape.heads * (before**2 + rows * (before + work.tokens))
        text = shape.layers * prompts * (a_row * (before + rows) + scores)
        patches = work.student.patches
        a_patch = 10 * v.hidden + 3 * v.intermediate + 2 * v.heads * patches
        return setting.item * (text + v.layers * prompts * patches * a_patch)
    a_row = 12 * shape.hidden + 4 * shape.intermediate + 8 * shape.query
    a_patch = 16 * v.hidden + 4 * v.intermediate
    return setting.item * prompts * (shape.layers * (before + rows) * a_row + v.layers * work.student.patches * a_patch)


def activations(shape: Shape, tune: Tune, work: Work, setting: Setting, again: bool) -> Activations:
    """Activations of the student's forward; with `again`, each layer's inputs, and the largest layer once."""
    v, item, prompts = shape.vision, setting.item, work.together
    before, rows = work.student.tokens - 1, work.completions * work.tokens
    patches = prompts * work.student.patches * tune.sees
    block = patches * _patch(shape, work, setting)
    prompt = prompts * _prompt(shape, tune, before, setting)
    completion = prompts * _completion(shape, tune, before, work.tokens, rows, setting)
    # Features, the mergers' norm, product and GELU; the pixels.
    merged = patches // v.merge**2 * (1 + v.taps) * (v.merged * (3 * item + FLOAT) + shape.hidden * item) + patches * v.values * item
    # The last layer of a prompt gives keys and values alone.
    keys = prompts * before * 2 * shape.key * item
    final = prompts * rows * shape.hidden * 3 * FLOAT
    # One layer's backward. torch: the gradients of three feed-forward arrays; MLX: of every array, of attention weights twice.
    wide = (v.intermediate * patches, shape.intermediate * prompts * before, shape.intermediate * prompts * rows)
    scores = (
        v.heads * patches * work.student.patches,
        shape.heads * prompts * before**2,
        shape.heads * prompts * rows * (before + work.tokens),
    )
    made = (block, prompt, completion)
    passing = [made[i] + 2 * item * scores[i] if setting.mlx else 3 * item * wide[i] for i in range(3)]
    if not again:
        return Activations(
            v.layers * block + merged,
            (shape.layers - 1) * prompt + 2 * keys,
            shape.layers * completion + final,
            (passing[0], passing[1], passing[2]),
        )
    stream = FLOAT if setting.half and not setting.mlx else item
    return Activations(
        v.layers * patches * v.hidden * item + merged,
        shape.layers * (keys + prompts * before * shape.hidden * stream),
        shape.layers * prompts * rows * shape.hidden * stream + final,
        (made[0] + passing[0], made[1] + passing[1], made[2] + passing[2]),
    )


def _prompt(shape: Shape, tune: Tune, rows: int, setting: Setting) -> int:
    """Bytes of a layer for `rows` tokens of one prompt."""
    item = setting.item
    if setting.mlx:
        # Two residuals, two norms, two sums; gate, sigmoid, its product, up, their product; and the attention weights.
        a_row = 6 * shape.hidden + 5 * shape.intermediate + 4 * shape.query + 5 * shape.key
        return item * rows * (a_row + shape.heads * rows)
    return rows * (_products(shape, tune, setting) + (shape.query + shape.key) * item + (shape.query + shape.key) * item)


def _completion(shape: Shape, tune: Tune, before: int, length: int, rows: int, setting: Setting) -> int:
    """Bytes of a layer for `rows` tokens of one prompt's completions, `length` each, after `before` tokens of the prompt."""
    item = setting.item
    if setting.mlx:
        a_row = 6 * shape.hidden + 5 * shape.intermediate + 5 * shape.query + 3 * shape.key
        return item * rows * (a_row + shape.heads * (before + length))
    # Queries in groups, what attention gives, and its copy for the output product; and every completion has the prompt's keys
    # and values copied before its own, and the mask stands in the products' type for all queries that share a key.
    beside = rows // length * (before + length) * 2 * shape.key + shape.query // shape.key * length * (before + length)
    return rows * (_products(shape, tune, setting) + 3 * shape.query * item) + beside * item


def _products(shape: Shape, tune: Tune, setting: Setting) -> int:
    """Bytes of a token in a layer on torch, attention left out.

    Residual and normalised rows of both norms in float32; under autocast each product casts its input again (five of them); gate,
    its SiLU, up and their product; queries and keys before their norm in float32, and after it.
    """
    item = setting.item
    if not tune.full:
        # Norms that are not trained keep their input alone, nothing is cast, and each adapter keeps its narrow row.
        narrow = tune.rank * len(tune.targets) * item
        return shape.hidden * 2 * (FLOAT + item) + 4 * shape.intermediate * item + (shape.query + shape.key) * FLOAT + narrow
    inputs = (5 if setting.half else 2) * item
    return shape.hidden * (4 * FLOAT + inputs) + 4 * shape.intermediate * item + (shape.query + shape.key) * (FLOAT + item)


def _patch(shape: Shape, work: Work, setting: Setting) -> int:
    """Bytes of a patch in a block of the tower."""
    v, item = shape.vision, setting.item
    if setting.mlx:
        # Five arrays for GELU as x * sigmoid; the attention weights over the image.
        return item * (12 * v.hidden + 5 * v.intermediate + v.heads * work.student.patches)
    # Two norms with input and output, queries with keys and values before rotation, queries and keys after it, and the mixture.
    return v.hidden * (2 * (FLOAT + item) + 6 * item) + 2 * v.intermediate * item


def _held(shape: Shape, tune: Tune, work: Work, setting: Setting) -> dict[str, int]:
    counts, trained = shape.parameters, sum(tune.trained(shape).values())
    if tune.full:
        # torch keeps a frozen tower in float32, MLX in the type of computation.
        frozen = (sum(counts.values()) - trained) * (setting.item if setting.mlx else FLOAT)
    else:
        layers = shape.layers * shape.layer if tune.kind == "qlora" else 0
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
    return shape.layers * shape.layer if tune.full else sum(tune.trained(shape).values())


def _head_gradient(shape: Shape, tune: Tune) -> int:
    """The head's own gradient, until it is added to what came through the embedding."""
    return FLOAT * shape.embedding if tune.full else 0


def _cache(shape: Shape, work: Work, setting: Setting) -> int:
    """Keys and values of every layer: of prompts once, of completions in buffers."""
    room = work.tokens
    if not setting.mlx:
        room = ROOM
        while room < work.tokens:
            room *= 2
    tokens = work.together * (work.student.tokens + work.completions * room)
    return 2 * shape.key * shape.layers * tokens * setting.item


def _sampled(shape: Shape, tune: Tune, work: Work, setting: Setting) -> int:
    """Logits of a token step and what drawing from them takes, and the head in the products' type."""
    rows = min(work.together * work.completions, max(16, CHUNK_BYTES // (FLOAT * shape.vocabulary)))
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
    rows = work.together * work.completions * work.tokens
    chunk = FLOAT * shape.vocabulary * min(rows, max(16, CHUNK_BYTES // (FLOAT * shape.vocabulary)))
    # Counted by tests/test_torch_memory.py and tests/test_mlx_memory.py.
    buffers = 10 if setting.mlx else 4 if not top_k or top_k >= shape.vocabulary else 3.2
    heads = (1 + tune.full) * shape.embedding * _head_copy(tune, setting)
    states = rows * shape.hidden * (2 * setting.item + FLOAT)
    return int(buffers * chunk) + heads + states + _head_gradient(shape, tune)


def _passing(shape: Shape, work: Work, setting: Setting, view: View) -> int:
    """A forward without a backward over prompts seen as `view`: keys and values of all layers, and the widest layer passing by."""
    prompts, before = work.together, view.tokens - 1
    keys = 2 * shape.key * shape.layers * before * prompts * setting.item
    row = 3 * shape.intermediate * setting.item + 3 * shape.hidden * FLOAT
    patch = shape.vision.hidden * 6 * FLOAT + 2 * shape.vision.intermediate * setting.item
    # MLX without its fused kernel: scores, less their largest, exponentials, weights.
    scores = 4 * setting.item * setting.mlx * (not setting.gpu)
    language = prompts * before * (row + scores * shape.heads * before)
    image = prompts * view.patches * (patch + scores * shape.vision.heads * view.patches)
    return max(keys + language, image)
