"""Estimates the bytes that a backward holds, and chooses the share of layers to recompute."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import transformers

from opd.planner import Config, Layer, LayerBytes, Layers, Rows, Shapes
from opd.types import Prompt
from opd_torch.batch import Batch
from opd_torch.families import family
from opd_torch.layers.gated_delta import CHUNK
from opd_torch.model.load import Model


def parameters(config: Config) -> Shapes:
    """The shapes of all parameters, from transformers' model on the meta device."""
    settings = transformers.AutoConfig.for_model(**config)
    settings.vision_config.vision_use_head = False  # no forward uses the head
    with torch.device("meta"):
        model = getattr(transformers, family(settings.model_type).architecture)(settings)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


def layer_bytes(text: Config, item: int, gpu: bool, full: bool) -> tuple[LayerBytes, float]:
    """What a layer holds: norms in float32 and casts of the inputs of products for every row, and
    less if fused kernels run; and the margin with which a backward is compared.

    `item`: bytes of a number in computation. `full`: whether all weights are trained.
    """
    fused = gpu and item == 2

    def held(layer: Layer, rows: Rows) -> tuple[float, float]:
        if rows.kind == "patches":
            row = 8.0 * layer.norms + 2 * item * layer.outputs
        elif fused:
            products = layer.outputs + 0.35 * (layer.query + layer.key)
            row = 4 * layer.norms + (4.1 if full else 3.75) * products
        else:
            row = 4.0 * (1 + full) * (layer.norms + layer.turned)
            row += 2 * item * (layer.width + layer.outputs)
        if layer.state:
            heads, width = text["linear_num_value_heads"], text["linear_key_head_dim"]
            keys, values = heads * width, heads * text["linear_value_head_dim"]
            channels = 2 * text["linear_num_key_heads"] * width + values
            # A chunk holds a state, and six matrices of CHUNK x CHUNK for each head. Rows longer
            # than a chunk are padded to whole chunks. Adapters hold less, because convolution and
            # norm get no gradient.
            solved = 9 * (keys + values) + 6 * heads * CHUNK + 2 * width * values // CHUNK
            chunks = -(-rows.length // CHUNK) * CHUNK / rows.length if rows.length > CHUNK else 1
            row += (3 * item * channels + 3.6 * solved * chunks) * (1 if full else 0.85)
        # Where `kernels.joined` does not run, each completion copies the prompt's keys.
        copied = layer.window is not None or (gpu and not fused)
        total = rows.total * row + 2 * item * layer.key * rows.count * rows.before * copied
        return total, 0.35 * total

    return held, 1.1 if fused else 1.4 if item == 2 else 1.65


def activation_bytes(model: Model, batch: Batch) -> int:
    """The bytes that the backward of a batch holds. They are 0 without a family file, because those
    models are recomputed row by row.
    """
    sources, count = batch.prefixes.sources, batch.ragged.rows
    longest = max(map(len, sources), default=1) - 1
    completions = Rows("completions", count, -(-len(batch.tokens) // max(1, count)), longest)
    return prompt_bytes(model, sources, len(batch.prefixes.tokens), [completions])


def prompt_bytes(
    model: Model, prompts: Sequence[Prompt], tokens: int, completions: Sequence[Rows] = ()
) -> int:
    """The bytes that a backward holds of the prompts' images, of `tokens` text tokens, and of
    completions."""
    if model.family is None:
        return 0
    config, count = model.module.config, len(prompts)
    patches = sum(model.family.patches(config, prompt) for prompt in prompts)
    rows = Rows("patches", 1, patches), Rows("prompts", count, -(-tokens // count)), *completions
    layers, text = _layers(config.to_json_string(use_diff=False))
    full = model.head.requires_grad
    layer, margin = layer_bytes(text, model.dtype.itemsize, model.device.gpu, full)
    return int(margin * layers.held(rows, layer))


@cache
def _layers(config: str) -> tuple[Layers, Config]:
    """The layers of a config.json, and its settings of the language model."""
    stated: dict[str, Any] = json.loads(config)
    return Layers(stated, parameters(stated)), stated["text_config"]


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
