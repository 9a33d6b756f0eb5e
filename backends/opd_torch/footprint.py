"""Bytes that a backward holds, roughly, and the share of layers to recompute instead."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opd.types import Prompt
from opd_torch.batch import Batch
from opd_torch.layers.gated_delta import CHUNK
from opd_torch.model.load import Model


def activation_bytes(model: Model, batch: Batch) -> int:
    """Bytes that the backward of a batch holds; 0 without a family, which recomputes row by row."""
    if model.family is None:
        return 0
    prefixes = batch.prefixes
    return prompt_bytes(model, prefixes.sources, len(prefixes.tokens) + len(batch.tokens))


def prompt_bytes(model: Model, prompts: Sequence[Prompt], tokens: int) -> int:
    """Bytes that a backward holds of the prompts' images and of `tokens` text tokens."""
    assert model.family is not None
    config = model.module.config
    patches = sum(model.family.patches(config, prompt) for prompt in prompts)
    return estimate(config, model.dtype.itemsize, model.device.fused, tokens, patches)


def estimate(config: Any, itemsize: int, fused: bool, tokens: int, patches: int) -> int:
    """Bytes of what each layer's products keep of `tokens` text tokens and of `patches`.

    `config` is transformers'; `itemsize` bytes has a number in computation. Fused kernels keep
    less.
    """
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = text.num_attention_heads * head
    deltas = list(getattr(text, "layer_types", None) or ()).count("linear_attention")
    # How many rows of the hidden width, of the feed-forward's and of all heads a layer keeps: of
    # the text, and of the tower.
    wide, forward, attention, tower_wide, tower_forward = (
        (8, 3, 4, 12, 2) if fused else (12, 4, 8, 16, 4)
    )
    row = text.num_hidden_layers * (wide * text.hidden_size + forward * text.intermediate_size)
    row += (text.num_hidden_layers - deltas) * attention * heads
    per_token = itemsize * row + (deltas * delta_bytes(text, itemsize) if deltas else 0)
    per_patch = tower_wide * vision.hidden_size + tower_forward * vision.intermediate_size
    depth = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
    return int(tokens * per_token + itemsize * depth * patches * per_patch)


def delta_bytes(text: Any, itemsize: int) -> int:
    """Bytes that a gated delta net's backward holds of a token, beside the rows of every layer; the
    solve is float32.
    """
    heads, width = text.linear_num_value_heads, text.linear_key_head_dim
    keys, values = heads * width, heads * text.linear_value_head_dim
    channels = 2 * text.linear_num_key_heads * width + values
    # Every chunk starts from a state of its own, and its tokens meet in six squares.
    solve = 9 * keys + 9 * values + 6 * heads * CHUNK + 2 * width * values // CHUNK
    return int(itemsize * 3 * channels + 4 * solve)


def recompute_share(model: Model, wanted: int) -> float:
    """The share of layers to recompute in a backward that would hold `wanted` bytes."""
    if wanted <= model.device.checkpoint_above:
        return 0.0
    return max(0.0, 1 - max(0, free_bytes(model)) / wanted) if model.device.gpu else 1.0


def free_bytes(model: Model) -> int:
    """Bytes of the GPU that nothing else will need before the gradient is complete, less a tenth as
    a margin.
    """
    device = model.device.torch
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    parameters = model.parameters.values()
    gradient = sum(parameter.nbytes for parameter in parameters if parameter.grad is None)
    casts = 0
    if model.dtype == torch.bfloat16:
        casts = sum(parameter.numel() for parameter in parameters) * model.dtype.itemsize
    return int(0.9 * (torch.cuda.mem_get_info(device)[0] + unused - gradient - casts))
