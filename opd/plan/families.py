"""How each family's configuration names its sizes: from config.json, as transformers completes it, to a `Shape`.

To add a family, write one function here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from math import isqrt
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import ModelError
from opd.models.consistency import check_sizes, complete
from opd.models.files import read_json
from opd.plan.shape import Attention, Delta, Projector, Shape, Vision
from opd.prompts.families import family

Config: TypeAlias = Mapping[str, Any]


def read_shape(folder: Path) -> Shape:
    """The sizes in a folder's config.json; nothing else is read. Raises ModelError."""
    return shape_of(read_config(folder))


def shape_of(config: Config) -> Shape:
    """The sizes in a configuration with all its defaults."""
    return READERS[config["model_type"]](config)


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a supported family, with the defaults of transformers for what it leaves out. Raises ModelError."""
    file = folder / "config.json"
    if not file.is_file():
        raise ModelError(f"{folder}: no config.json, so this is no model folder")
    stated = read_json(file)
    check_sizes(file, stated)
    try:
        family(str(stated.get("model_type")))
    except ModelError as error:
        raise ModelError(f"{file}: {error}; of another model nothing can be planned, though torch may train it by rows") from None
    return complete(file, stated)


def _qwen3_vl(config: Config) -> Shape:
    return _shape(config, [_attention(config, normed=True)] * config["text_config"]["num_hidden_layers"], _tapped_tower(config))


def _qwen2_5_vl(config: Config) -> Shape:
    text, vision = config["text_config"], config["vision_config"]
    plain = _attention(config)
    windows = [text["sliding_window"] if kind == "sliding_attention" else None for kind in text["layer_types"]]
    layers = [_attention(config, biases=plain.query + 2 * plain.key, window=window) for window in windows]
    width, merge = vision["hidden_size"], vision["spatial_merge_size"]
    merged = width * merge**2
    # A norm without bias over patches, and two biases.
    projector = Projector(((merged, merged), (merged, text["hidden_size"])), width + merged + text["hidden_size"])
    window = vision["window_size"] // merge // vision["patch_size"] * merge
    windowed = vision["depth"] - len(set(vision["fullatt_block_indexes"]) & set(range(vision["depth"])))
    return _shape(config, layers, _qwen_tower(config, 0, projector, gated=True, window=window, windowed=windowed))


def _qwen3_5(config: Config) -> Shape:
    text = config["text_config"]
    delta = Delta(
        text["linear_num_key_heads"],
        text["linear_num_value_heads"],
        text["linear_key_head_dim"],
        text["linear_value_head_dim"],
        text["linear_conv_kernel_dim"],
    )
    gated = _attention(config, normed=True, gated=True)
    layers = [delta if kind == "linear_attention" else gated for kind in text["layer_types"]]
    return _shape(config, layers, _tapped_tower(config))


def _gemma3(config: Config) -> Shape:
    text, vision = config["text_config"], config["vision_config"]
    windows = [text["sliding_window"] if kind == "sliding_attention" else None for kind in text["layer_types"]]
    layers = [_attention(config, normed=True, window=window, blocks=True) for window in windows]
    # Patches are averaged, normalised, and multiplied by a matrix that is no linear layer.
    projector = Projector(((vision["hidden_size"], text["hidden_size"]),), vision["hidden_size"], linear=False)
    merge = vision["image_size"] // vision["patch_size"] // isqrt(config["mm_tokens_per_image"])
    return replace(_shape(config, layers, _siglip(config, merge, projector)), norms=4, gelu=True)


def _idefics3(config: Config) -> Shape:
    text, vision, merge = config["text_config"], config["vision_config"], config["scale_factor"]
    projector = Projector(((vision["hidden_size"] * merge**2, text["hidden_size"]),), 0)
    return _shape(config, [_attention(config)] * text["num_hidden_layers"], _siglip(config, merge, projector))


def _shape(config: Config, layers: list[Attention] | list[Attention | Delta], vision: Vision) -> Shape:
    text = config["text_config"]
    tied = bool(config["tie_word_embeddings"])
    return Shape(text["hidden_size"], text["intermediate_size"], text["vocab_size"], tied, tuple(layers), vision)


def _attention(config: Config, **kind: Any) -> Attention:
    text = config["text_config"]
    heads = text["num_attention_heads"]
    return Attention(heads, text["num_key_value_heads"], text.get("head_dim") or text["hidden_size"] // heads, **kind)


def _tapped_tower(config: Config) -> Vision:
    """Of Qwen3-VL and Qwen3.5: learned positions, and a merger of its own for each tap."""
    text, vision = config["text_config"], config["vision_config"]
    width, merge = vision["hidden_size"], vision["spatial_merge_size"]
    taps, merged = len(vision.get("deepstack_visual_indexes") or ()), width * merge**2
    # Two biases in each merger; the last normalises patches, those of taps visual tokens, all with biases.
    others = (1 + taps) * (merged + text["hidden_size"]) + 2 * width + taps * 2 * merged
    projector = Projector(((merged, merged), (merged, text["hidden_size"])) * (1 + taps), others)
    return _qwen_tower(config, width * (1 + vision["num_position_embeddings"]), projector, taps=taps)


def _qwen_tower(config: Config, embedding: int, projector: Projector, **kind: Any) -> Vision:
    """The sizes that all Qwen towers name alike: patches of several frames, merged into tokens."""
    vision = config["vision_config"]
    return Vision(
        vision["hidden_size"],
        vision["depth"],
        vision["num_heads"],
        vision["intermediate_size"],
        vision["in_channels"] * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
        vision["spatial_merge_size"],
        embedding,
        projector,
        moments=vision["temporal_patch_size"],
        **kind,
    )


def _siglip(config: Config, merge: int, projector: Projector) -> Vision:
    """Of Gemma 3 and Idefics3: learned positions, and a norm behind the blocks."""
    vision = config["vision_config"]
    width, positions = vision["hidden_size"], (vision["image_size"] // vision["patch_size"]) ** 2
    return Vision(
        width,
        vision["num_hidden_layers"],
        vision["num_attention_heads"],
        vision["intermediate_size"],
        vision["num_channels"] * vision["patch_size"] ** 2,
        merge,
        width * (1 + positions + 2),
        projector,
        apart=True,
    )


READERS: dict[str, Callable[[Config], Shape]] = {
    "qwen3_vl": _qwen3_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_5": _qwen3_5,
    "gemma3": _gemma3,
    "idefics3": _idefics3,
    "smolvlm": _idefics3,
}
"""By `model_type`."""
