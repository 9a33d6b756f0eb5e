"""The least FLOPs that a group needs: every prompt once, every completion row once, nothing padded, no key that is not seen.
And, of attention layers, its elementary functions (exponentials, logarithms, hyperbolic tangents): no FLOPs, but they take time.

FLOPs are in the units of `measuring.flops`. A product costs 2 a weight and row in the forward and twice that in the backward; where layers
are computed again, they cost their forward once more, up to the last product, whose result nobody needs.
After the last layer nobody reads a prompt's rows: there only what hands something to the completions is counted.

Legend: see `workload`.
"""

from __future__ import annotations

from typing import Any

from benchmarks.workload import Shape, visual_tokens


def group(config: Any, shape: Shape, again: bool = False) -> int:
    """Student forward and backward, teacher forward, and the head of both with its gradient."""
    rows = shape.n * shape.completion
    head: int = 4 * 2 * rows * config.text_config.hidden_size * config.text_config.vocab_size
    student = trunk(config, shape.prompt, shape.completion, shape.n, backward=True, again=again)
    return head + student + trunk(config, shape.crop or shape.prompt, shape.completion, shape.n)


def functions(config: Any, shape: Shape) -> int:
    """The elementary functions of the same, with the full vocabulary's Jensen-Shannon divergence.

    A backward takes as many as its forward: weights of attention from their scores again, slopes of gates from what went in; but the
    tower's GELU, which keeps its slope. A logit takes four: an exponential in each policy, and for the mixture an expm1 and a log1p. What
    comes once a row and head, or once for all layers, is left out.
    """
    head: int = 4 * shape.n * shape.completion * config.text_config.vocab_size
    student = trunk_functions(config, shape.prompt, shape.completion, shape.n, backward=True)
    return head + student + trunk_functions(config, shape.crop or shape.prompt, shape.completion, shape.n)


def trunk_functions(config: Any, prompt: int, completion: int, n: int, backward: bool = False) -> int:
    """Those of one policy without the head: one for each pair and head of attention, and one for each activation of a gate."""
    text, vision = config.text_config, config.vision_config
    assert not text.model_type.startswith("qwen3_5"), "functions of gated attention and delta nets are not counted"
    layers, (of_prompt, of_completions) = text.num_hidden_layers, pairs(prompt, completion, n)
    attended: int = text.num_attention_heads * ((layers - 1) * of_prompt + layers * of_completions)
    gates: int = text.intermediate_size * ((layers - 1) * (prompt - 1) + layers * n * completion)
    patches = patches_of(vision, prompt)
    tower: int = patches * (vision.depth * vision.num_heads * patches + mergers(vision) * vision.hidden_size)
    kept: int = patches * vision.depth * vision.intermediate_size
    return (2 if backward else 1) * (attended + gates + tower) + kept


def pairs(prompt: int, completion: int, n: int) -> tuple[int, int]:
    """Pairs of a query and a key that it sees: queries of a prompt but for its last token, which predicts; and of n completions."""
    before = prompt - 1
    return before * (before + 1) // 2, n * (completion * before + completion * (completion + 1) // 2)


def patches_of(vision: Any, prompt: int) -> int:
    """Patches of the one image of `workload.prompt`."""
    return visual_tokens(prompt) * int(vision.spatial_merge_size) ** 2


def mergers(vision: Any) -> int:
    """Mergers of patches: one after the tower, and one for each level that feeds the text."""
    return 1 + len(getattr(vision, "deepstack_visual_indexes", None) or [])


def trunk(config: Any, prompt: int, completion: int, n: int, backward: bool = False, again: bool = False) -> int:
    """One policy over a prompt and n completions, without the head."""
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
    patches = patches_of(vision, prompt)
    embed = 2 * patches * width * vision.in_channels * vision.patch_size**2  # one frame of a still image stands for all
    last = vision.depth * patches * 2 * width * vision.intermediate_size
    blocks = vision.depth * patches * (2 * 4 * width * width + 4 * patches * width) + 2 * last
    merging = mergers(vision) * patches * 2 * width * (merge * width + vision.out_hidden_size)
    total: int = embed + blocks + merging
    if backward:
        total += embed + 2 * (blocks + merging)  # pixels need no gradient
        total += blocks - last if again else 0
    return total
