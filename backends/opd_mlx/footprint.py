"""Bytes that a backward holds, estimated from shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd_mlx.batch import Batch
from opd_mlx.kernels.scores import KEPT_BYTES
from opd_mlx.layers.gated_delta import CHUNK, SEGMENT
from opd_mlx.model import Model


def activation_bytes(model: Model, batch: Batch) -> int:
    """Bytes that a backward holds, roughly: what each layer's products keep, of text and of images, and scores where they are few."""
    text = model.config["text_config"]
    prompts, width = batch.prefixes.shape
    count, length = batch.shape[1:]
    heads = text["num_attention_heads"]
    head = text.get("head_dim") or text["hidden_size"] // heads
    deltas = list(text.get("layer_types") or ()).count("linear_attention")
    attends, tokens = text["num_hidden_layers"] - deltas, prompts * (width + count * length)
    rows = text["num_hidden_layers"] * (6 * text["hidden_size"] + 3 * text["intermediate_size"]) + attends * 6 * heads * head
    scores = min(4 * heads * prompts * (width * width + count * length * (width + length)), 2 * KEPT_BYTES)
    states = deltas * prompts * (delta_bytes(text, width) + count * delta_bytes(text, length)) if deltas else 0
    images = sum(model.family.vision_bytes(model.config, prompt, model.dtype.size) for prompt in batch.prefixes.sources)
    return int(model.dtype.size * tokens * rows + attends * scores + states + images)


def delta_bytes(text: Mapping[str, Any], length: int) -> int:
    """Bytes that a backward holds of `length` tokens in a gated delta net, beside what every layer keeps; all of it is float32."""
    heads, width = text["linear_num_value_heads"], text["linear_key_head_dim"]
    keys, values = heads * width, heads * text["linear_value_head_dim"]
    channels = 2 * text["linear_num_key_heads"] * width + values
    # Of longer rows the rule is computed again, a segment at a time. Its inverse of a triangle keeps all rows before each row.
    solved = 6 * keys + 3 * values + heads * CHUNK * (8 + CHUNK // 2) + 2 * width * values // CHUNK if length <= SEGMENT else 0
    return int(4 * length * (4 * channels + 4 * values + solved))
