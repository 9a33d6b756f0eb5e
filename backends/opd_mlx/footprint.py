"""Estimates the bytes of a backward: to plan a run, and to choose the layers to recompute."""

from __future__ import annotations

import json

import mlx.core as mx

from opd.planner import Config, Footprint, Layer, LayerBytes, Rows
from opd.types import ModelOptions
from opd_mlx.batch import Batch
from opd_mlx.device import Device, machine, this_device
from opd_mlx.families import family
from opd_mlx.layers.gated_delta import CHUNK
from opd_mlx.model import Model, Parameters
from opd_mlx.model.shapes import parameters, shape_of


class BackendPlanner:
    """`opd.planner.Planner` for a Mac, and for MLX on a processor."""

    parameters, machine = staticmethod(parameters), staticmethod(machine)

    def footprint(self, options: ModelOptions, config: Config, here: bool) -> Footprint:
        """The bytes of a micro-batch."""
        full, item, device = options.adapters is None, options.item, this_device()
        return Footprint(
            layer_bytes(config, item, device, full),
            margin=1.0,
            image_blocks=family(config["model_type"]).image_blocks,
            stream=item,
            frozen=item,
            cast=2 * full * (item == 2),
            keeps_casts=True,
            head_copy=4 * (item == 2 and not full),
            head=3.0 if here and not device.gpu else 8.0,
            together=device.gradient_bytes,
        )


MLX = BackendPlanner()


def layer_bytes(config: Config, item: int, device: Device, full: bool) -> LayerBytes:
    """A function that estimates the bytes of a layer, which holds norms, sums and the inputs of
    products in the type of computation, and attention scores up to `Device.kept_score_bytes`.

    `item`: bytes of a number in computation. `full`: whether all weights are trained.
    """
    text, vision = config["text_config"], config["vision_config"]
    gelu = "gelu" in str(text.get("hidden_activation") or text.get("hidden_act"))
    share = (4 + full + gelu) / 2

    def held(layer: Layer, rows: Rows) -> tuple[float, float]:
        heads = text["num_attention_heads"]
        if rows.kind == "patches":
            heads = vision.get("num_attention_heads") or vision["num_heads"]
            row = 4.0 * (layer.width + layer.outputs)
        else:
            row = 2 * (layer.width + layer.norms) + share * layer.outputs
            row += (5 - share) * layer.query + (4 - share) * layer.key
        total = rows.total * item * row
        if not layer.state:
            scores = 4 * heads * rows.total * (rows.before + rows.length)
            total += min(scores, device.kept_score_bytes)
            return total, total + min(2 * scores, 4 * device.score_block_bytes)
        heads, width = text["linear_num_value_heads"], text["linear_key_head_dim"]
        keys, values = heads * width, heads * text["linear_value_head_dim"]
        channels = 2 * text["linear_num_key_heads"] * width + values
        # mlx-vlm inverts a triangular matrix row by row, and the backward keeps every stage. Rows
        # longer than a chunk are padded to whole chunks; in a shorter row the squares are smaller.
        solved = 6 * keys + 3 * values + heads * CHUNK * (8 + CHUNK // 2)
        solved += 2 * width * values // CHUNK
        padded = -(-rows.length // CHUNK) * CHUNK if rows.length > CHUNK else rows.length**2 / CHUNK
        # Adapters need no gradients to convolution and norm.
        total += 16 * rows.total * (channels + values) * (1.0 if full else 0.65)
        rule, segments = 4 * rows.count * padded * solved, rows.length / device.delta_segment
        # For longer rows the backward recomputes the rule segment by segment.
        return (total + rule, total + rule) if segments <= 1 else (total, total + rule / segments)

    return held


def activation_bytes(model: Model, batch: Batch) -> int:
    """The bytes that the backward of a batch holds."""
    (count, length), each = batch.prefixes.shape, batch.shape[1:]
    rows = [Rows("prompts", count, length), Rows("completions", count * each[0], each[1], length)]
    for prompt in batch.prefixes.sources:
        rows += [Rows("patches", *size) for size in model.family.patches(model.config, prompt)]
    full = model.frozen_head is None
    layer = layer_bytes(model.config, model.dtype.size, model.device, full)
    return int(shape_of(json.dumps(model.config)).held(rows, layer))


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
    casts = dtype.size * sum(value.size for value in trained.values()) * (dtype != mx.float32)
    return int(2 / 3 * (free - missing - casts))
