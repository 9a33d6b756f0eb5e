"""Estimates the bytes that a backward holds, and chooses the share of layers to recompute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx

from opd_mlx.batch import Batch
from opd_mlx.device import Device
from opd_mlx.layers.gated_delta import CHUNK
from opd_mlx.model import Model, Parameters


def activation_bytes(model: Model, batch: Batch) -> int:
    """The bytes that the backward of a batch holds."""
    images: list[tuple[int, int]] = []
    for prompt in batch.prefixes.sources:
        images += model.family.patches(model.config, prompt)
    rows = *batch.prefixes.shape, *batch.shape[1:]
    return estimate(model.config, model.dtype.size, model.device, rows, images)


def estimate(
    config: Mapping[str, Any],
    itemsize: int,
    device: Device,
    rows: tuple[int, int, int, int],
    images: Sequence[tuple[int, int]],
) -> int:
    """The bytes that a backward holds, with attention scores up to `Device.kept_score_bytes`.

    `rows` are (prompts, tokens of each, completions of each, tokens of each), `images` pairs
    (images that attend together, patches of each), and `itemsize` is the bytes of a number in
    computation.
    """
    text, vision = config["text_config"], config["vision_config"]
    prompts, width, count, length = rows
    heads = text["num_attention_heads"]
    vision_heads = vision.get("num_heads") or vision["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    layers, deltas = text["num_hidden_layers"], _delta_layers(text)
    attends, tokens = layers - deltas, prompts * (width + count * length)
    per_token = layers * (6 * text["hidden_size"] + 3 * text["intermediate_size"])
    per_token += attends * 6 * heads * head
    scores = 4 * heads * prompts * (width * width + count * length * (width + length))
    scores = min(scores, 2 * device.kept_score_bytes)
    states = 0
    if deltas:
        segment = device.delta_segment
        per_prompt = delta_bytes(text, width, segment) + count * delta_bytes(text, length, segment)
        states = deltas * prompts * per_prompt
    per_patch = 10 * vision["hidden_size"] + 3 * vision["intermediate_size"]
    depth = vision.get("depth") or vision["num_hidden_layers"]
    tower = sum(
        itemsize * count * patches * per_patch
        + min(4 * vision_heads * count * patches**2, device.kept_score_bytes)
        for count, patches in images
    )
    return int(itemsize * tokens * per_token + attends * scores + states + depth * tower)


def delta_bytes(text: Mapping[str, Any], length: int, segment: int) -> int:
    """The bytes that the backward of a gated delta net holds of `length` tokens, in addition to the
    rows of every layer. All of it is float32.

    For rows longer than a `segment` the backward recomputes the delta rule segment by segment.
    """
    heads, width = text["linear_num_value_heads"], text["linear_key_head_dim"]
    keys, values = heads * width, heads * text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * width + values
    solved = 0
    if length <= segment:
        # mlx-vlm inverts a triangular matrix row by row, and the backward keeps every stage.
        solved = 6 * keys + 3 * values + heads * CHUNK * (8 + CHUNK // 2)
        solved += 2 * width * values // CHUNK
    return int(4 * length * (4 * channels + 4 * values + solved))


def recompute_share(
    model: Model, activations: int, trained: Parameters, gradient: Parameters
) -> float:
    """The share of layers, 0 to 1, to recompute in a backward that would hold `activations` bytes.

    `gradient` is the gradient accumulated so far.
    """
    device = model.device
    if activations <= device.checkpoint_above:
        return 0.0
    free = device.free_bytes
    if free is None:
        free = free_bytes(device, model.dtype, trained, gradient)
    return 1 - min(max(0, free), activations) / max(1, activations)


def free_bytes(device: Device, dtype: mx.Dtype, trained: Parameters, gradient: Parameters) -> int:
    """The GPU's bytes that stay free until the gradient is complete, with a margin of a third; may
    be negative.
    """
    free = device.memory - mx.get_active_memory()
    missing = sum(value.nbytes for name, value in trained.items() if name not in gradient)
    casts = 0
    if dtype != mx.float32:
        casts = sum(value.size for value in trained.values()) * dtype.size
    return int(2 / 3 * (free - missing - casts))


def _delta_layers(text: Mapping[str, Any]) -> int:
    return list(text.get("layer_types") or ()).count("linear_attention")
