"""Estimates the bytes of a backward: to plan a run, and to choose the layers to recompute."""

from __future__ import annotations

import torch

from opd.planner import Config, Footprint, Layer, LayerBytes, Machine, Rows
from opd.types import ModelOptions
from opd_torch.batch import Batch, Prefixes
from opd_torch.device import machine
from opd_torch.families import family
from opd_torch.layers.gated_delta import CHUNK
from opd_torch.model.load import Model
from opd_torch.model.shapes import parameters, shape_of


class BackendPlanner:
    """`opd.planner.Planner` for a GPU or for the CPU."""

    def __init__(self, gpu: bool) -> None:
        self._gpu = gpu

    parameters = staticmethod(parameters)

    def machine(self) -> Machine:
        """The first GPU, or the processor. Raises BackendError without a GPU."""
        return machine(self._gpu)

    def footprint(self, options: ModelOptions, config: Config, here: bool) -> Footprint:
        """The bytes of a micro-batch."""
        full, item = options.adapters is None, options.item
        return Footprint(
            *layer_bytes(config, item, self._gpu, full),
            image_blocks=family(config["model_type"]).image_blocks,
            stream=4,
            frozen=4 if full else item,
            cast=2 * full * (item == 2),
            keeps_casts=False,
            head_copy=4 * (item == 2 and not self._gpu),
            head=3.2 if self._gpu else 2.0,
            together=0,
        )


CUDA = BackendPlanner(gpu=True)
CPU = BackendPlanner(gpu=False)


def layer_bytes(config: Config, item: int, gpu: bool, full: bool) -> tuple[LayerBytes, float]:
    """A function that estimates the bytes of a layer, and the margin of `opd.planner.Footprint`. A
    layer holds norms in float32 and casts of the inputs of products, and less with fused kernels.

    `item`: bytes of a number in computation. `full`: whether all weights are trained.
    """
    fused, text = gpu and item == 2, config["text_config"]

    def held(layer: Layer, rows: Rows) -> tuple[float, float]:
        if rows.kind == "patches":
            row = 8.0 * layer.norms + 2 * item * layer.outputs
        elif fused:
            products = layer.outputs + 0.35 * (layer.query + layer.key)
            row = 4 * layer.norms + (4.1 if full else 3.75) * products
        else:
            row = 4.0 * (1 + full) * (layer.norms + layer.normalised)
            row += 2 * item * (layer.width + layer.outputs)
        if layer.state:
            heads, width = text["linear_num_value_heads"], text["linear_key_head_dim"]
            keys, values = heads * width, heads * text["linear_value_head_dim"]
            channels = 2 * text["linear_num_key_heads"] * width + values
            # A chunk holds a state and, for each head, six matrices of CHUNK x CHUNK. Longer rows
            # are padded to whole chunks. With adapters convolution and norm need no gradient.
            solved = 9 * (keys + values) + 6 * heads * CHUNK + 2 * width * values // CHUNK
            chunks = -(-rows.length // CHUNK) * CHUNK / rows.length if rows.length > CHUNK else 1
            row += (3 * item * channels + 3.6 * solved * chunks) * (1 if full else 0.85)
        # Where `kernels.joined` does not run, each completion copies the prompt's keys.
        copied = layer.window is not None or (gpu and not fused)
        total = rows.total * row + 2 * item * layer.key * rows.count * rows.before * copied
        return total, 0.35 * total

    return held, 1.1 if fused else 1.4 if item == 2 else 1.65


def activation_bytes(model: Model, batch: Batch | Prefixes) -> int:
    """The bytes that the backward of prompts, and of their completions if there are any, holds.
    They are 0 without a family file, because those models are recomputed row by row.
    """
    if model.family is None:
        return 0
    prompts = batch if isinstance(batch, Prefixes) else batch.prefixes
    sources, config = prompts.sources, model.module.config
    each = -(-len(prompts.tokens) // len(sources))
    patches = sum(model.family.patches(config, prompt) for prompt in sources)
    rows = [Rows("patches", 1, patches), Rows("prompts", len(sources), each)]
    if isinstance(batch, Batch):
        count, longest = batch.ragged.rows, max(map(len, sources)) - 1
        rows.append(Rows("completions", count, -(-len(batch.tokens) // count), longest))
    shape = shape_of(config.to_json_string(use_diff=False))
    full, item = model.head.requires_grad, model.dtype.itemsize
    layer, margin = layer_bytes(shape.config, item, model.device.gpu, full)
    return int(margin * shape.held(rows, layer))


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
    gradient = sum(one.nbytes for one in parameters if one.grad is None)
    casts = 2 * sum(one.numel() for one in parameters) * (model.dtype == torch.bfloat16)
    return int(0.9 * (torch.cuda.mem_get_info(device)[0] + unused - gradient - casts))
