"""Bytes that a backward holds, estimated from shapes, and how many layers it should recompute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from opd_mlx.batch import Batch
from opd_mlx.device import Device
from opd_mlx.layers.gated_delta import CHUNK
from opd_mlx.model import Model, Parameters


def activation_bytes(model: Model, batch: Batch) -> int:
    """Bytes that a backward holds, roughly."""
    images = [
        one
        for prompt in batch.prefixes.sources
        for one in model.family.patches(model.config, prompt)
    ]
    rows = *batch.prefixes.shape, *batch.shape[1:]
    return estimate(model.config, model.dtype.size, model.device, rows, images)


def estimate(
    config: Mapping[str, Any],
    itemsize: int,
    device: Device,
    rows: tuple[int, int, int, int],
    images: Sequence[tuple[int, int]],
) -> int:
    """Bytes of what each layer's products keep, of text and of images, and scores where they are
    few.

    `rows`: prompts, tokens of each, completions of each, and tokens of each. `images`: images that
    go through the tower together, and patches of each. `itemsize` bytes has a number in
    computation.
    """
    text, vision = config["text_config"], config["vision_config"]
    prompts, width, count, length = rows
    heads = text["num_attention_heads"]
    vision_heads = vision.get("num_heads") or vision["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    layers, deltas = text["num_hidden_layers"], _delta_layers(text)
    attends, tokens = layers - deltas, prompts * (width + count * length)
    found = layers * (6 * text["hidden_size"] + 3 * text["intermediate_size"])
    found += attends * 6 * heads * head
    scores = 4 * heads * prompts * (width * width + count * length * (width + length))
    scores = min(scores, 2 * device.kept_score_bytes)
    states = 0
    if deltas:
        segment = device.delta_segment
        a_prompt = delta_bytes(text, width, segment) + count * delta_bytes(text, length, segment)
        states = deltas * prompts * a_prompt
    a_patch = 10 * vision["hidden_size"] + 3 * vision["intermediate_size"]
    depth = vision.get("depth") or vision["num_hidden_layers"]
    seen = sum(
        itemsize * count * patches * a_patch
        + min(4 * vision_heads * count * patches**2, device.kept_score_bytes)
        for count, patches in images
    )
    return int(itemsize * tokens * found + attends * scores + states + depth * seen)


def delta_bytes(text: Mapping[str, Any], length: int, segment: int) -> int:
    """Bytes that a backward holds of `length` tokens in a gated delta net, all of it float32.

    What every layer keeps is not counted. Of rows longer than a `segment` the backward recomputes
    the delta rule, a segment at a time.
    """
    heads, width = text["linear_num_value_heads"], text["linear_key_head_dim"]
    keys, values = heads * width, heads * text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * width + values
    solved = 0
    if length <= segment:
        # The inverse of a triangle keeps all rows before each row.
        solved = 6 * keys + 3 * values + heads * CHUNK * (8 + CHUNK // 2)
        solved += 2 * width * values // CHUNK
    return int(4 * length * (4 * channels + 4 * values + solved))


def recompute_share(
    model: Model, activations: int, trained: Parameters, gradient: Parameters
) -> float:
    """The share of layers that a backward should recompute, if it would hold `activations` bytes.

    A CPU recomputes all layers or none; a GPU those whose activations do not fit. `gradient` is
    what has been accumulated so far.
    """
    if activations <= model.device.checkpoint_above:
        return 0.0
    if not model.device.gpu:
        return 1.0
    free = free_bytes(model.device, model.dtype, trained, gradient)
    return max(0.0, 1 - max(0, free) / activations)


def free_bytes(device: Device, dtype: mx.Dtype, trained: Parameters, gradient: Parameters) -> int:
    """Bytes of the GPU that stay free until the gradient is complete, less a third.

    The third is for what no formula counts. May be negative.
    """
    free = device.memory - mx.get_active_memory()
    missing = sum(value.nbytes for name, value in trained.items() if name not in gradient)
    casts = 0
    if dtype != mx.float32:
        casts = sum(value.size for value in trained.values()) * dtype.size
    return int(2 / 3 * (free - missing - casts))


def _delta_layers(text: Mapping[str, Any]) -> int:
    return list(text.get("layer_types") or ()).count("linear_attention")
