"""The least FLOPs that a group needs: every prompt once, every completion row once, nothing padded, no key that is not seen.

In the units of `measuring.flops`. A product costs 2 a weight and row in the forward and twice that in the backward; where layers are
computed again, they cost their forward once more, up to the last product, whose result nobody needs.
After the last layer nobody reads a prompt's rows: there only what hands something to the completions is counted.

Legend: see `workload`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.workload import Shape, visual_tokens


def group(config: Any, shape: Shape, again: bool = False) -> int:
    """Student forward and backward, teacher forward, and the head of both with its gradient."""
    rows = shape.n * shape.completion
    head = 4 * 2 * rows * config.text_config.hidden_size * config.text_config.vocab_size
    student = trunk(config, shape.prompt, shape.completion, shape.n, backward=True, again=again)
    return head + student + trunk(config, shape.crop or shape.prompt, shape.completion, shape.n)


def trunk(config: Any, prompt: int, completion: int, n: int, backward: bool = False, again: bool = False) -> int:
    """One policy over a prompt and n completions, without the head."""
    text = config.text_config
    before, rows = prompt - 1, n * completion
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    pairs = before * (before + 1) // 2, n * (completion * before + completion * (completion + 1) // 2)
    total = 0
    for number, kind in enumerate(kinds):
        memory, rest, last, mixing = delta(text) if kind == "linear_attention" else attention(text)
        mixed = (before, rows) if kind == "linear_attention" else pairs
        final = number + 1 == len(kinds)
        if kind == "linear_attention" or not final:
            mixing *= sum(mixed)
        else:
            mixing *= mixed[1]
        products = memory * (before + rows) + (rest + last) * (rows if final else before + rows)
        total += products + mixing
        if backward:
            total += 2 * (products + mixing)
        if backward and again:
            total += products + mixing - last * (rows if final else before + rows)
    return total + vision(config, prompt, backward, again)


def attention(text: Any) -> tuple[int, int, int, int]:
    """FLOPs of a row of an attention layer: for what it keeps; for all else but the last product; for that; and for each pair."""
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    gate = 2 if text.model_type.startswith("qwen3_5") else 1  # a gate as wide as the queries comes out of the same projection
    memory = 2 * 2 * width * text.num_key_value_heads * text.head_dim
    rest = 2 * width * heads * (gate + 1) + 2 * 2 * width * text.intermediate_size
    return memory, rest, 2 * width * text.intermediate_size, 4 * heads


def delta(text: Any) -> tuple[int, int, int, int]:
    """The same of a gated delta net; for each row its recurrence reads, writes and reads the state once, as no chunked form can."""
    width = text.hidden_size
    keys, values = text.linear_num_key_heads * text.linear_key_head_dim, text.linear_num_value_heads * text.linear_value_head_dim
    memory = (
        2 * width * (2 * keys + values)
        + 2 * width * 2 * text.linear_num_value_heads
        + 2 * (2 * keys + values) * text.linear_conv_kernel_dim
    )
    rest = 2 * 2 * width * values + 2 * 2 * width * text.intermediate_size
    return memory, rest, 2 * width * text.intermediate_size, 3 * 2 * values * text.linear_key_head_dim


def vision(config: Any, prompt: int, backward: bool, again: bool) -> int:
    """The tower over the one image of `workload.prompt`."""
    vision = config.vision_config
    width, merge = vision.hidden_size, vision.spatial_merge_size**2
    merged = visual_tokens(prompt)
    patches = merged * merge
    embed = 2 * patches * width * vision.in_channels * vision.patch_size**2  # one frame of a still image stands for all
    last = vision.depth * patches * 2 * width * vision.intermediate_size
    blocks = vision.depth * patches * (2 * 4 * width * width + 4 * patches * width) + 2 * last
    mergers = 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])
    merging = mergers * merged * 2 * merge * width * (merge * width + vision.out_hidden_size)
    total = embed + blocks + merging
    if backward:
        total += embed + 2 * (blocks + merging)  # pixels need no gradient
        total += blocks - last if again else 0
    return total
