"""Counts the least work that a group needs: FLOPs, and elementary functions.

The least work computes every prompt once and every completion row once, pads nothing, and attends
only to visible keys. Elementary functions are exponentials, logarithms and hyperbolic tangents:
they are not FLOPs, but they take time. They are counted for models of attention layers only.

FLOPs have the units of `measuring.flops`. A matrix product costs 2 per weight and row in the
forward and 4 in the backward. A recomputed layer costs another forward without its last product,
whose result the backward does not need. In the last layer nothing reads the output of a prompt's
rows, so only what the completions read there (keys, values, states) is counted.

`workload` has the legend.
"""

from __future__ import annotations

from typing import Any

from benchmarks.workload import Shape, visual_tokens


def group(config: Any, shape: Shape, recompute: bool = False) -> int:
    """FLOPs of a group's training stage: student forward and backward, teacher forward, both
    heads, and the gradient of the student's head."""
    rows = shape.n * shape.completion
    head: int = 4 * 2 * rows * config.text_config.hidden_size * config.text_config.vocab_size
    student = trunk(
        config, shape.prompt, shape.completion, shape.n, backward=True, recompute=recompute
    )
    return head + student + trunk(config, shape.crop or shape.prompt, shape.completion, shape.n)


def functions(config: Any, shape: Shape) -> int:
    """Elementary functions of a group's training stage, with the Jensen-Shannon divergence over
    the full vocabulary.

    A backward takes as many functions as its forward, because it recomputes attention weights and
    the derivatives of gates. The tower's GELU takes none, because it stores its derivative. A
    logit takes four: an exponential in each policy, and an expm1 and a log1p for the mixture.
    Functions that run once per row and head, or once for all layers, are left out.
    """
    head: int = 4 * shape.n * shape.completion * config.text_config.vocab_size
    student = trunk_functions(config, shape.prompt, shape.completion, shape.n, backward=True)
    return (
        head
        + student
        + trunk_functions(config, shape.crop or shape.prompt, shape.completion, shape.n)
    )


def trunk_functions(
    config: Any, prompt: int, completion: int, n: int, backward: bool = False
) -> int:
    """Elementary functions of one policy without the head: one for each head and each pair of a
    query and a visible key, and one for each activation of a gate."""
    text, vision = config.text_config, config.vision_config
    assert not text.model_type.startswith("qwen3_5"), (
        "functions of gated attention and delta nets are not counted"
    )
    layers, (of_prompt, of_completions) = text.num_hidden_layers, pairs(prompt, completion, n)
    attended: int = text.num_attention_heads * ((layers - 1) * of_prompt + layers * of_completions)
    gates: int = text.intermediate_size * ((layers - 1) * (prompt - 1) + layers * n * completion)
    patches = patches_of(vision, prompt)
    tower: int = patches * (
        vision.depth * vision.num_heads * patches + mergers(vision) * vision.hidden_size
    )
    gelu: int = patches * vision.depth * vision.intermediate_size
    return (2 if backward else 1) * (attended + gates + tower) + gelu


def pairs(prompt: int, completion: int, n: int) -> tuple[int, int]:
    """Pairs of a query and a visible key: for the queries of a prompt, and of n completions.

    The prompt's last token predicts the first token of every completion, so the completions count
    it.
    """
    before = prompt - 1
    return before * (before + 1) // 2, n * (
        completion * before + completion * (completion + 1) // 2
    )


def patches_of(vision: Any, prompt: int) -> int:
    """Patches of the image in `workload.prompt`."""
    return visual_tokens(prompt) * int(vision.spatial_merge_size) ** 2


def mergers(vision: Any) -> int:
    """Mergers of patches: one after the tower, and one for each deepstack level."""
    return 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])


def trunk(
    config: Any,
    prompt: int,
    completion: int,
    n: int,
    backward: bool = False,
    recompute: bool = False,
) -> int:
    """FLOPs of one policy over a prompt and n completions, without the head."""
    text = config.text_config
    before, rows = prompt - 1, n * completion
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    seen = pairs(prompt, completion, n)
    total = 0
    for number, kind in enumerate(kinds):
        memory, rest, last, mixing = delta(text) if kind == "linear_attention" else attention(text)
        mixed = (before, rows) if kind == "linear_attention" else seen
        final = number + 1 == len(kinds)
        if kind == "linear_attention" or not final:
            mixing *= sum(mixed)
        else:
            mixing *= mixed[1]
        products = memory * (before + rows) + (rest + last) * (rows if final else before + rows)
        total += products + mixing
        if backward:
            total += 2 * (products + mixing)
        if backward and recompute:
            total += products + mixing - last * (rows if final else before + rows)
    return total + vision(config, prompt, backward, recompute)


def attention(text: Any) -> tuple[int, int, int, int]:
    """FLOPs of one row of an attention layer: keys and values; everything else but the last
    product; the last product; and one pair of a query and a key."""
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    gate = (
        2 if text.model_type.startswith("qwen3_5") else 1
    )  # a gate as wide as the queries comes out of the same projection
    memory = 2 * 2 * width * text.num_key_value_heads * text.head_dim
    rest = 2 * width * heads * (gate + 1) + 2 * 2 * width * text.intermediate_size
    return memory, rest, 2 * width * text.intermediate_size, 4 * heads


def delta(text: Any) -> tuple[int, int, int, int]:
    """FLOPs of one row of a gated delta net, in the parts of `attention`.

    The last part is the recurrence: it reads, writes and reads the state once per row. Chunked
    forms take more.
    """
    width = text.hidden_size
    keys, values = (
        text.linear_num_key_heads * text.linear_key_head_dim,
        text.linear_num_value_heads * text.linear_value_head_dim,
    )
    memory = (
        2 * width * (2 * keys + values)
        + 2 * width * 2 * text.linear_num_value_heads
        + 2 * (2 * keys + values) * text.linear_conv_kernel_dim
    )
    rest = 2 * 2 * width * values + 2 * 2 * width * text.intermediate_size
    return (
        memory,
        rest,
        2 * width * text.intermediate_size,
        3 * 2 * values * text.linear_key_head_dim,
    )


def vision(config: Any, prompt: int, backward: bool, recompute: bool) -> int:
    """FLOPs of the vision tower over the image of `workload.prompt`."""
    vision = config.vision_config
    width, merge = vision.hidden_size, vision.spatial_merge_size**2
    patches = patches_of(vision, prompt)
    # The frames of a still image are alike, so one product per patch is enough.
    embed = 2 * patches * width * vision.in_channels * vision.patch_size**2
    last = vision.depth * patches * 2 * width * vision.intermediate_size
    blocks = vision.depth * patches * (2 * 4 * width * width + 4 * patches * width) + 2 * last
    merging = mergers(vision) * patches * 2 * width * (merge * width + vision.out_hidden_size)
    total: int = embed + blocks + merging
    if backward:
        total += embed + 2 * (blocks + merging)  # pixels need no gradient
        total += blocks - last if recompute else 0
    return total
