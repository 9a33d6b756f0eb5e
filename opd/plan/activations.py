"""What a backward holds of a micro-batch, as the two backends hold it, in bytes: every factor says what it counts.

These are the arrays that `attention.py`, `vision.py` and the families of each backend keep for a backward, one by one; rows of a
micro-batch are taken to be of one length, as the planned lengths are.

Legend: D hidden width, I feed-forward width; of a delta net C channels, K keys repeated for every value head, V values.
"""

from __future__ import annotations

from dataclasses import dataclass

from opd.memory import FEATURES_MOST
from opd.plan.shape import Attention, Delta, Layer, Shape, Tune, Vision
from opd.plan.work import View, Work

FLOAT = 4
"""Bytes of a float32."""

CHUNK = 64
"""Tokens of which the delta rule is one solve, in both backends."""

SEGMENT = 4 * CHUNK
"""Tokens of which MLX holds what the delta rule computes; of longer rows it computes each segment again (`layers/gated_delta.py`)."""


KEPT_BYTES = 2**24
"""Scores of a call, in float32, that MLX keeps for its backward; of more it keeps none (`opd_mlx/kernels/scores.py`)."""

BLOCK_ROWS = {False: 128, True: 1024}
BLOCK_BYTES = {False: 2**23, True: 2**28}
"""Rows and scores of a block of MLX's attention, by whether on a GPU (the same file)."""


@dataclass(frozen=True)
class Setting:
    """How a backend computes: `mlx`, else torch; on a `gpu` products take half precision as it is; `half` is bfloat16.

    `features`: bytes of a frozen tower's results that it keeps at most; see `opd.memory.feature_bytes`.
    """

    mlx: bool
    gpu: bool
    half: bool
    features: int = FEATURES_MOST

    @property
    def item(self) -> int:
        """Bytes of a number in computation."""
        return 2 if self.half else FLOAT

    @property
    def stream(self) -> int:
        """Bytes of a number between layers: under autocast torch adds up in float32."""
        return FLOAT if self.half and not self.mlx else self.item


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


def activations(shape: Shape, tune: Tune, work: Work, setting: Setting, again: bool) -> Activations:
    """Activations of the student's forward; with `again`, each layer's inputs, and the largest layer once."""
    v, item, view, prompts = shape.vision, setting.item, work.student, work.together
    count = prompts * (work.split or work.completions)
    seen, windowed = (prompts * tune.sees * _block(v, view, window, prompts, setting) for window in (0, v.window))
    merged = prompts * tune.sees * _merged(shape, view, setting)
    prompt = {layer: prompts * _prompt(shape, tune, layer, view, prompts, setting) for layer in shape.kinds}
    completion = {layer: _completion(shape, tune, layer, view, work.tokens, count, setting) for layer in shape.kinds}
    handed = {layer: prompts * handed_bytes(layer, view.before, setting) for layer in shape.kinds}
    final = count * work.tokens * shape.hidden * 3 * FLOAT
    passing = _passing(shape, tune, work, setting, count)
    if not again:
        # The last layer gives of a prompt what it hands to completions alone.
        last, first = shape.layers[-1], shape.layers[0]
        kept = handed[last] * 2 if isinstance(last, Attention) else prompt[last]
        idle = [first] if isinstance(first, Delta) and not _reached(shape, tune) else []
        return Activations(
            v.whole * seen + v.windowed * windowed + merged,
            sum(prompt[layer] for layer in shape.layers[:-1])
            + kept
            - sum(prompts * delta_held(tune, layer, view.before, setting) for layer in idle),
            sum(completion[layer] for layer in shape.layers)
            + final
            - sum(count * delta_held(tune, layer, work.tokens, setting) for layer in idle),
            passing,
        )
    rows = len(shape.layers) * shape.hidden * setting.stream
    made = max(seen, windowed * bool(v.windowed)), max(prompt.values()), max(completion.values())
    return Activations(
        tune.sees * v.layers * prompts * view.patches * v.hidden * item + merged,
        sum(handed[layer] for layer in shape.layers) + prompts * view.before * rows,
        count * work.tokens * rows + final,
        (made[0] + passing[0], made[1] + passing[1], made[2] + passing[2]),
    )


def _reached(shape: Shape, tune: Tune) -> bool:
    """Whether a backward goes through what mixes tokens in the first layer: something is trained there or before it."""
    return tune.full or tune.sees or any(tune.adapts(name) for name in shape.layers[0].linears(shape.hidden))


def _passing(shape: Shape, tune: Tune, work: Work, setting: Setting, count: int) -> tuple[int, int, int]:
    """What one layer's backward needs beside what was held: the largest of the tower's, the prompts' and the completions' layers."""
    v, view, prompts, item = shape.vision, work.student, work.together, setting.item
    rows = prompts * view.patches * tune.sees, prompts * view.before, count * work.tokens
    wide = v.intermediate, shape.intermediate, shape.intermediate
    if not setting.mlx:
        # The gradients of three feed-forward arrays, or of a quarter of what the delta rule keeps.
        deltas = [layer for layer in shape.kinds if isinstance(layer, Delta)]
        solved = [
            max((times * delta_bytes(tune, layer, length, setting) // 4 for layer in deltas), default=0)
            for times, length in ((prompts, view.before), (count, work.tokens))
        ]
        found = [3 * item * width * many for width, many in zip(wide, rows, strict=True)]
        return found[0], max(found[1], solved[0]), max(found[2], solved[1])
    # The gradients of every array, and what is beside them.
    layers = list(shape.kinds)
    one = tune.sees * max(
        prompts * _block(v, view, window, prompts, setting) + passing_scores(2 * FLOAT * prompts * v.heads * view.pairs(window), setting)
        for window in (0, v.window)
    )
    two = max(
        prompts * _prompt(shape, tune, layer, view, prompts, setting) + _beside(tune, layer, view.before, 0, prompts, setting)
        for layer in layers
    )
    three = max(
        _completion(shape, tune, layer, view, work.tokens, count, setting) + _beside(tune, layer, work.tokens, view.before, count, setting)
        for layer in layers
    )
    return one, two, three


def _beside(tune: Tune, layer: Layer, length: int, before: int, count: int, setting: Setting) -> int:
    """What MLX's backward needs of a layer beside the gradients of what is held, of `count` rows of `length` tokens behind `before`
    others.

    Twice the attention weights of a block; or of what a delta net computes three fifths, as counted, since it is freed on the way, but of
    a segment that is computed again all once more.
    """
    if isinstance(layer, Attention):
        return passing_scores(2 * count * _scores(layer, length, before, setting), setting)
    segment = delta_bytes(tune, layer, min(length, SEGMENT), setting)
    return count * (segment if length > SEGMENT else -2 * segment // 5)


def _prompt(shape: Shape, tune: Tune, layer: Layer, view: View, prompts: int, setting: Setting) -> int:
    """Bytes of one prompt in a layer that `prompts` pass together."""
    item, rows = setting.item, view.before
    found = rows * _row(shape, tune, layer, setting)
    if isinstance(layer, Delta):
        return found + delta_held(tune, layer, rows, setting)
    if setting.mlx:
        # Queries once more, keys and values twice; and the attention weights.
        return found + item * rows * (2 * layer.query + 3 * layer.key) + _kept(_scores(layer, rows, 0, setting), prompts)
    # Rotated queries and keys, values, and what attention gives; a mask in the products' type.
    masked = layer.blocks or (layer.window is not None and layer.window < rows)
    return found + item * (rows * 2 * (layer.query + layer.key) + masked * rows**2)


def _completion(shape: Shape, tune: Tune, layer: Layer, view: View, length: int, count: int, setting: Setting) -> int:
    """Bytes of `count` completions of `length` tokens in a layer."""
    item, rows, keys = setting.item, count * length, view.before + length
    found = rows * _row(shape, tune, layer, setting)
    if isinstance(layer, Delta):
        # Every completion starts from a copy of its prompt's state and window.
        forked = handed_bytes(layer, 0, setting)
        return found + count * (delta_held(tune, layer, length, setting) + forked)
    if setting.mlx:
        return found + item * rows * (3 * layer.query + layer.key) + count * _kept(_scores(layer, length, view.before, setting), count)
    if _joined(layer, setting):
        # Rotated queries and keys, values, what attention gives, and of each head the logarithm of a sum in float32.
        return found + rows * (item * 2 * (layer.query + layer.key) + FLOAT * layer.heads)
    # Queries in groups, what attention gives, and its copy for the output product; every completion has the prompt's keys and values
    # copied before its own; and the mask stands in the products' type for all queries that share a key.
    beside = count * keys * 2 * layer.key + layer.query // layer.key * length * keys
    return found + item * (rows * 3 * layer.query + beside)


def _joined(layer: Attention, setting: Setting) -> bool:
    """Whether torch joins two attentions of completions, which copies no prompt's keys (`joinable` in `joined.py`)."""
    return layer.window is None and (not setting.gpu or (setting.half and layer.head_dim % 8 == 0))


def _row(shape: Shape, tune: Tune, layer: Layer, setting: Setting) -> int:
    """Bytes of a token in a layer, apart from what mixes tokens.

    torch: residual and normalised rows of each norm in float32; under autocast each product casts its input again (five of them);
    gate, its activation, up and their product; queries and keys before their norm in float32, and after it.
    """
    item, wide = setting.item, shape.intermediate
    normed = (layer.query + layer.key) * layer.normed if isinstance(layer, Attention) else 0
    # The gate itself, its sigmoid, and what it lets through.
    gate = 3 * layer.query * layer.gated if isinstance(layer, Attention) else 0
    if setting.mlx:
        # Two residuals, two sums, a norm's result each; gate, sigmoid (of GELU a tanh and what it is of), its product, up, their product;
        # queries and keys twice.
        attended = 2 * (layer.query + layer.key) if isinstance(layer, Attention) else 0
        return item * ((2 + 2 * shape.norms) * shape.hidden + (4 + tune.full + shape.gelu) * wide + attended + gate)
    if not tune.full:
        # Norms that are not trained keep their input alone, nothing is cast, and each adapter keeps its narrow row.
        narrow = tune.rank * len(tune.adapted(shape, layer)) * item
        return shape.hidden * (shape.norms * FLOAT + 2 * item) + 4 * wide * item + normed * FLOAT + gate * item + narrow
    inputs = (5 if setting.half else 2) * item
    return shape.hidden * (2 * shape.norms * FLOAT + inputs) + 4 * wide * item + normed * (FLOAT + item) + gate * item


def _scores(layer: Layer, length: int, before: int, setting: Setting) -> int:
    """Bytes of attention scores of `length` tokens over themselves, in blocks that see no later ones, and over `before` others."""
    seen = before + (length + min(length, BLOCK_ROWS[setting.gpu])) // 2
    return FLOAT * layer.heads * length * seen if isinstance(layer, Attention) else 0


def _kept(scores: int, together: int) -> int:
    """Bytes of scores that MLX keeps of one of as many as are computed `together`."""
    return scores if together * scores <= KEPT_BYTES else 0


def scores_again(shape: Shape, work: Work, setting: Setting) -> tuple[int, int, int]:
    """Bytes of attention scores of a group's tower, prompt and completions that MLX does not keep, and so computes again."""
    if not setting.mlx:
        return 0, 0, 0
    v, view = shape.vision, work.student
    tower = [(many, FLOAT * v.heads * view.pairs(window), 1) for many, window in ((v.whole, 0), (v.windowed, v.window))]
    prompt = [(many, _scores(layer, view.before, 0, setting), 1) for layer, many in shape.kinds.items()]
    completions = [(many, _scores(layer, work.tokens, view.before, setting), work.completions) for layer, many in shape.kinds.items()]

    def again(layers: list[tuple[int, int, int]]) -> int:
        return sum(many * count * (scores - _kept(scores, count)) for many, scores, count in layers)

    return again(tower), again(prompt), again(completions)


def passing_scores(size: int, setting: Setting) -> int:
    """Bytes of arrays as large as all scores, of which a block is alive at a time."""
    return min(size, 4 * BLOCK_BYTES[setting.gpu])


def handed_bytes(layer: Layer, before: int, setting: Setting) -> int:
    """Bytes of what a layer hands on to a completion: keys and values of `before` tokens, or a state and the convolution's window."""
    if isinstance(layer, Delta):
        return FLOAT * layer.state + setting.item * layer.channels * (layer.kernel - 1)
    return setting.item * 2 * layer.key * before


def delta_bytes(tune: Tune, layer: Delta, length: int, setting: Setting) -> int:
    """Bytes of `length` tokens that run one after the other in a delta net, beside `_row`.

    Of each token inputs and outputs of convolution and activation, and five or six arrays of values for norm and gate; without a trained
    convolution, norm and output projection some of them are not needed. What the rule solves is float32, in whole chunks.
    """
    chunk = min(CHUNK, length)
    chunks = -(-length // chunk)
    keys, square = layer.value_heads * layer.key_dim, layer.value_heads * chunk
    states = FLOAT * 2 * layer.state * chunks
    channels, values = (3, 6) if tune.full else (2, 3 + tune.adapts("out_proj"))
    if setting.mlx:
        # Its inverse of a triangle keeps all rows before each row.
        solved = 6 * keys + 3 * layer.values + 8 * square + square * chunk // 2
        each = (channels + 1) * layer.channels + (values - 2) * layer.values
        return states + FLOAT * (length * each + chunks * chunk * solved)
    solved = 9 * keys + 3 * layer.values + 6 * square
    return states + length * (setting.item * channels * layer.channels + FLOAT * values * layer.values) + chunks * chunk * FLOAT * solved


def delta_held(tune: Tune, layer: Delta, length: int, setting: Setting) -> int:
    """Bytes of `delta_bytes` that a backward holds: of a row in segments what they start from, what they find, and gate and norm."""
    if not setting.mlx or length <= SEGMENT:
        return delta_bytes(tune, layer, length, setting)
    return FLOAT * (4 * length * (layer.channels + layer.values) + layer.state * -(-length // SEGMENT))


def _block(vision: Vision, view: View, window: int, prompts: int, setting: Setting) -> int:
    """Bytes of an image in a block of the tower that attends within windows of `window` patches, or, at 0, within the whole image."""
    v, item = vision, setting.item
    if setting.mlx:
        # Five arrays for GELU as x * sigmoid, as for a gate; the attention weights.
        # On a CPU images run a tile at a time.
        scores = _kept(FLOAT * v.heads * view.pairs(window), prompts if setting.gpu else 1)
        return item * view.patches * (12 * v.hidden + 5 * v.intermediate) + scores
    # Two norms with input and output (and, without biases, what is normalised between); queries with keys and values before rotation,
    # queries and keys after it, and the mixture; of windows that are put together once more.
    mixed = 4 if v.apart else 6 + (window > 0)
    norms = 2 * (FLOAT * (1 + v.gated) + item)
    return view.patches * (v.hidden * (norms + mixed * item) + (2 + 2 * v.gated) * v.intermediate * item)


def _merged(shape: Shape, view: View, setting: Setting) -> int:
    """Bytes of an image's pixels and in the projector: inputs of each product, norm and GELU, and the features."""
    v, item = shape.vision, setting.item
    taken = sum(inputs for inputs, _ in v.projector.products)
    features = (1 + v.taps) * shape.hidden * item
    norms = (1 + v.taps) * v.hidden * v.merge**2 * (FLOAT + item)
    return view.visual * (taken * item + norms + features) + view.patches * v.values * item
