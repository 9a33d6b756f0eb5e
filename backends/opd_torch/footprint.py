"""Bytes that a backward holds, and how much of it to compute again instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from opd.types import Prompt
from opd_torch.batch import Batch
from opd_torch.kernels.pointwise import HalfNorm
from opd_torch.layers.gated_delta import CHUNK

CHECKPOINT_ABOVE = 2 * 1024**3
"""Bytes of activations that a backward may hold; where a call is estimated above it, layers are computed again instead: all, and on a GPU
those whose activations do not fit in the memory that is free."""


def activation_bytes(model: Any, batch: Batch, itemsize: int) -> int:
    """Bytes that a backward holds, roughly; rows by themselves see to it."""
    sources = batch.prefixes.sources
    return 0 if model.family is None else prompt_bytes(model, sources, len(batch.prefixes.tokens) + len(batch.tokens), itemsize)


def prompt_bytes(model: Any, prompts: Sequence[Prompt], tokens: int, itemsize: int) -> int:
    """Bytes that a backward holds of prompts' images and of `tokens`, roughly: what each layer's products keep."""
    text, vision = model.config.text_config, model.config.vision_config
    heads = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    deltas = list(getattr(text, "layer_types", None) or ()).count("linear_attention")
    # Residuals and norms, feed-forward, heads; of the text, and of the tower. Kernels that do several operations at once keep less.
    fused = isinstance(model.family.language(model).norm, HalfNorm)
    wide, forward, its_heads, its_wide, its_forward = (8, 3, 4, 12, 2) if fused else (12, 4, 8, 16, 4)
    rows = text.num_hidden_layers * (wide * text.hidden_size + forward * text.intermediate_size)
    rows += (text.num_hidden_layers - deltas) * its_heads * heads
    a_token = itemsize * rows + (deltas * delta_bytes(text, itemsize) if deltas else 0)
    a_patch = its_wide * vision.hidden_size + its_forward * vision.intermediate_size
    depth = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
    patches = sum(model.family.patches(prompt, model) for prompt in prompts)
    return int(tokens * a_token + itemsize * depth * patches * a_patch)


def delta_bytes(text: Any, itemsize: int) -> int:
    """Bytes that a backward holds of a token in a gated delta net, beside what every layer keeps; what the rule solves is float32."""
    heads, width = text.linear_num_value_heads, text.linear_key_head_dim
    keys, values = heads * width, heads * text.linear_value_head_dim
    channels = 2 * text.linear_num_key_heads * width + values
    # Every chunk starts from a state of its own, and its tokens meet in six squares.
    return int(itemsize * 3 * channels + 4 * (9 * keys + 9 * values + 6 * heads * CHUNK + 2 * width * values // CHUNK))
