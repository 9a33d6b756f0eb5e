"""Estimates the bytes that a backward holds, and chooses the share of layers to recompute."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from opd.types import Prompt
from opd_torch.batch import Batch
from opd_torch.layers.gated_delta import CHUNK
from opd_torch.model.load import Model


def activation_bytes(model: Model, batch: Batch) -> int:
    """The bytes that the backward of a batch holds. They are 0 without a family file, because those
    models are recomputed row by row.
    """
    if model.family is None:
        return 0
    prefixes = batch.prefixes
    return prompt_bytes(model, prefixes.sources, len(prefixes.tokens) + len(batch.tokens))


def prompt_bytes(model: Model, prompts: Sequence[Prompt], tokens: int) -> int:
    """The bytes that a backward holds of the prompts' images and of `tokens` text tokens."""
    assert model.family is not None
    config = model.module.config
    patches = sum(model.family.patches(config, prompt) for prompt in prompts)
    return estimate(config, model.dtype.itemsize, model.device.fused, tokens, patches)


def estimate(config: Any, itemsize: int, fused: bool, tokens: int, patches: int) -> int:
    """The bytes that a backward holds of `tokens` text tokens and `patches` patches.

    `config` is transformers' configuration, `itemsize` the bytes of a number in computation, and
    `fused` says whether fused kernels run, which hold less.
    """
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    heads = text.num_attention_heads * head
    deltas = list(getattr(text, "layer_types", None) or ()).count("linear_attention")
    # The numbers of rows that a layer keeps: rows of the hidden width, of the feed-forward's width
    # and of the width of all heads in the trunk, then the first two in the tower.
    kept_rows = (8, 3, 4, 12, 2) if fused else (12, 4, 8, 16, 4)
    wide, forward, attention, tower_wide, tower_forward = kept_rows
    row = text.num_hidden_layers * (wide * text.hidden_size + forward * text.intermediate_size)
    row += (text.num_hidden_layers - deltas) * attention * heads
    per_token = itemsize * row + (deltas * sum(delta_bytes(text, itemsize)) if deltas else 0)
    per_patch = tower_wide * vision.hidden_size + tower_forward * vision.intermediate_size
    depth = vision.depth if hasattr(vision, "depth") else vision.num_hidden_layers
    return int(tokens * per_token + itemsize * depth * patches * per_patch)


def delta_bytes(text: Any, itemsize: int) -> tuple[int, int]:
    """The bytes that the backward of a gated delta net holds per token, in addition to the rows of
    every layer: those of its convolution, and those of the delta rule, which computes in float32.
    """
    heads, width = text.linear_num_value_heads, text.linear_key_head_dim
    keys, values = heads * width, heads * text.linear_value_head_dim
    channels = 2 * text.linear_num_key_heads * width + values
    # A chunk keeps a state, and six matrices of CHUNK x CHUNK for each head.
    solve = 9 * keys + 9 * values + 6 * heads * CHUNK + 2 * width * values // CHUNK
    return itemsize * 3 * channels, 4 * solve


def recompute_share(model: Model, wanted: int) -> float:
    """The share of layers, 0 to 1, to recompute in a backward that would hold `wanted` bytes."""
    device = model.device
    if wanted <= device.checkpoint_above:
        return 0.0
    free = free_bytes(model) if device.free_bytes is None else device.free_bytes
    return 1 - min(max(0, free), wanted) / max(1, wanted)


def free_bytes(model: Model) -> int:
    """The GPU's bytes that stay free until the gradient is complete, with a margin of a tenth."""
    device = model.device.torch
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    parameters = model.parameters.values()
    gradient = sum(parameter.nbytes for parameter in parameters if parameter.grad is None)
    casts = 0
    if model.dtype == torch.bfloat16:
        casts = sum(parameter.numel() for parameter in parameters) * model.dtype.itemsize
    return int(0.9 * (torch.cuda.mem_get_info(device)[0] + unused - gradient - casts))
