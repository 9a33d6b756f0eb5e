"""The settings of config.json that each family's forward computes, per backend; any other setting
that changes the logits raises ModelError.

The configuration class of transformers lists the settings of a family and their defaults. A setting
is accepted if TABLE holds its value for the backend, if HARMLESS names it, or if it is at the
default. A key that the class does not know changes nothing in transformers, and changes nothing
here; a warning is logged if the key looks like a setting of a forward.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from opd.errors import ModelError, shown

Values: TypeAlias = "tuple[Any, ...] | None"
"""Values that a backend computes as transformers does; None: every value that transformers
accepts."""


class Setting(NamedTuple):
    """The values of one setting that each backend computes."""

    torch: Values
    mlx: Values


ANY = Setting(None, None)
SILU, TANH = ("silu", "swish"), ("gelu_pytorch_tanh",)


def only(*values: Any) -> Setting:
    """A setting of which both backends compute these values alone."""
    return Setting(values, values)


def mlx_only(*values: Any) -> Setting:
    """A setting of which torch computes every value, and MLX these values alone."""
    return Setting(None, values)


HARMLESS = {
    # The model's name and origin, and the form of its outputs.
    "_name_or_path",
    "architectures",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "problem_type",
    "output_hidden_states",
    "output_attentions",
    "return_dict",
    "use_cache",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    # Settings of training and of initial weights.
    "initializer_range",
    "attention_dropout",
    "pretraining_tp",
    # Bounds that no forward reads; rotary types that depend on the length are refused (ROPE).
    "max_position_embeddings",
    "max_window_layers",
    "_sliding_window_pattern",
    # Token ids, which prompts hold already, and settings of videos.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "_pad_token_id",
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "vision_start_token_id",
    "vision_end_token_id",
    "boi_token_index",
    "eoi_token_index",
    "tokens_per_second",
    # The pooling head of a vision tower, which no forward here computes.
    "vision_use_head",
}
"""Names of settings, at any level, that do not change the logits of a prompt with images."""

INNER_HARMLESS = ("text_config.tie_word_embeddings", "vision_config.tie_word_embeddings")
"""Settings that are overridden: the outermost `tie_word_embeddings` decides, as in transformers."""

ROPE = {
    # With `dynamic` and `longrope` a token's angles depend on the length of the row, but one
    # prompt serves completions of different lengths.
    "rope_type": Setting(("default", "linear", "yarn", "llama3"), ("default",)),
    **dict.fromkeys(
        (
            "type",
            "rope_theta",
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
            "low_freq_factor",
            "high_freq_factor",
            "short_factor",
            "long_factor",
        ),
        ANY,
    ),
    "partial_rotary_factor": only(None, 1.0),
}
"""Settings of rotary positions. Those after `rope_type` are read by some types alone."""

MROPE = ROPE | {"mrope_section": ANY, "mrope_interleaved": ANY}


def _at(place: str, settings: Mapping[str, Setting]) -> dict[str, Setting]:
    return {f"{place}.{name}": value for name, value in settings.items()}


def _sizes(place: str, *names: str) -> dict[str, Setting]:
    return {f"{place}.{name}": ANY for name in names}


_TEXT = _sizes(
    "text_config",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
)

_QWEN_VISION = {
    **_sizes(
        "vision_config",
        "depth",
        "hidden_size",
        "intermediate_size",
        "num_heads",
        "patch_size",
        "spatial_merge_size",
        "temporal_patch_size",
        "out_hidden_size",
    ),
    "vision_config.rope_parameters.rope_theta": mlx_only(10000.0),
}

_SIGLIP = {
    **_sizes(
        "vision_config",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
        "layer_norm_eps",
    ),
    "vision_config.hidden_act": mlx_only(*TANH),
}

_IDEFICS3 = {
    **_TEXT,
    "text_config.hidden_act": mlx_only(*SILU),
    "text_config.attention_bias": mlx_only(False),
    "text_config.mlp_bias": mlx_only(False),
    "text_config.head_dim": ANY,
    **_at("text_config.rope_parameters", ROPE),
    **_SIGLIP,
    "scale_factor": ANY,
    "tie_word_embeddings": ANY,
}

TABLE: Mapping[str, Mapping[str, Setting]] = {
    "qwen2_5_vl": {
        **_TEXT,
        "text_config.hidden_act": mlx_only(*SILU),
        "text_config.use_sliding_window": ANY,
        "text_config.sliding_window": ANY,
        "text_config.layer_types": ANY,
        **_at("text_config.rope_parameters", MROPE),
        **_QWEN_VISION,
        "vision_config.hidden_act": mlx_only(*SILU),
        "vision_config.window_size": ANY,
        "vision_config.fullatt_block_indexes": ANY,
        "tie_word_embeddings": ANY,
    },
    "qwen3_vl": {
        **_TEXT,
        "text_config.head_dim": ANY,
        "text_config.hidden_act": mlx_only(*SILU),
        "text_config.attention_bias": mlx_only(False),
        **_at("text_config.rope_parameters", MROPE),
        **_QWEN_VISION,
        "vision_config.hidden_act": mlx_only(*TANH),
        "vision_config.num_position_embeddings": ANY,
        "vision_config.deepstack_visual_indexes": ANY,
        "tie_word_embeddings": ANY,
    },
    "qwen3_5": {
        **_TEXT,
        "text_config.head_dim": ANY,
        "text_config.hidden_act": mlx_only(*SILU),
        "text_config.attention_bias": ANY,
        "text_config.layer_types": ANY,
        **_sizes(
            "text_config",
            "linear_conv_kernel_dim",
            "linear_key_head_dim",
            "linear_value_head_dim",
            "linear_num_key_heads",
            "linear_num_value_heads",
        ),
        **_at("text_config.rope_parameters", MROPE | {"partial_rotary_factor": ANY}),
        **_QWEN_VISION,
        "vision_config.hidden_act": mlx_only(*TANH),
        "vision_config.num_position_embeddings": ANY,
        "tie_word_embeddings": ANY,
    },
    "gemma3": {
        **_TEXT,
        "text_config.head_dim": ANY,
        "text_config.hidden_activation": mlx_only(*TANH),
        "text_config.attention_bias": mlx_only(False),
        "text_config.query_pre_attn_scalar": ANY,
        "text_config.sliding_window": ANY,
        "text_config.layer_types": ANY,
        **_at(
            "text_config.rope_parameters.full_attention",
            ROPE | {"rope_type": Setting(ROPE["rope_type"].torch, ("default", "linear"))},
        ),
        **_at(
            "text_config.rope_parameters.sliding_attention",
            ROPE | {"rope_type": Setting(ROPE["rope_type"].torch, ("default", "linear"))},
        ),
        **_SIGLIP,
        "mm_tokens_per_image": ANY,
        "tie_word_embeddings": ANY,
    },
    "idefics3": _IDEFICS3,
    "smolvlm": _IDEFICS3,
}
"""The computed settings, by model_type and by dotted key of a completed config.json."""

REACHES_IN = ("is_causal", "attention_chunk_size", "per_layer_config")
"""Keys that transformers reads although no configuration class declares them; None is the same as
absent."""

LOOKS_READ = re.compile(
    r"softcap|qk_norm|qk_layer_norm|_bias$|sliding_window$|layer_types|rope|rotary|hidden_act"
    r"|experts|multiplier|logit_scale|_eps$"
    r"|query_pre_attn|residual|use_final_norm|norm_type|deepstack|parallel"
)
"""Matches names of settings that change the forward of some published model."""


def check(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    written: Mapping[str, Any],
    file: Path,
    backend: str,
    other: str = "",
) -> None:
    """Raises ModelError if `backend` ("torch" or "mlx") does not compute a setting of config.json.

    `config`: the file as transformers completes it; `defaults`: an untouched configuration of the
    same classes; `written`: the file itself. `other`: the name of the other backend on the command
    line, for the message.
    """
    kind = str(config["model_type"])
    table, plain = TABLE[kind], dict(_flat(defaults))
    for key, value in _flat(config):
        name = key.rpartition(".")[2]
        if name in HARMLESS or key in INNER_HARMLESS or (key in plain and _same(value, plain[key])):
            continue
        setting = table.get(key)
        if (
            setting is None
            and key not in plain
            and not key.startswith(
                ("text_config.rope_parameters.", "vision_config.rope_parameters.")
            )
        ):
            if value and LOOKS_READ.search(name):
                logging.getLogger(__name__).warning(
                    "%s: %s = %s has no effect: neither opd nor transformers reads it",
                    file,
                    key,
                    shown(value),
                )
            continue
        values = _values(setting, backend)
        if setting is not None and (values is None or any(_same(value, one) for one in values)):
            continue
        hint = "no backend does, so this model cannot be trained as it is"
        theirs = _values(setting, "mlx" if backend == "torch" else "torch")
        if (
            setting is not None
            and other
            and (theirs is None or any(_same(value, one) for one in theirs))
        ):
            hint = f"--backend {other} does"
        raise ModelError(
            f"{file}: the {backend} backend does not compute {_named(key, written)} ="
            f" {shown(value)}; {hint}"
        )
    _check_together(config, written, file)


def defaults(configuration: Any) -> dict[str, Any]:
    """The default values of a configuration of transformers, whose sections have the same classes
    as those of `configuration`."""
    plain: dict[str, Any] = type(configuration)().to_dict()
    for name in ("text_config", "vision_config"):
        part = getattr(configuration, name)
        plain[name] = type(part)().to_dict() | {"model_type": plain[name]["model_type"]}
    return plain


def without_unknown(config: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without the keys that the classes of transformers do not know, so that another
    library does not read them."""
    known = {}
    for key, value in config.items():
        if key in ("text_config", "vision_config") and isinstance(value, Mapping):
            known[key] = without_unknown(value, defaults[key])
        elif key in defaults or key in ("model_type", "layer_types"):
            known[key] = value
    return known


def _check_together(config: Mapping[str, Any], written: Mapping[str, Any], file: Path) -> None:
    """Raises ModelError if settings contradict each other, or if a key that has to be one number
    holds several."""
    text, vision = config["text_config"], config["vision_config"]
    for place in ("", "text_config.", "vision_config."):
        inner = written.get(place[:-1], {}) if place else written
        for name in REACHES_IN:
            if isinstance(inner, Mapping) and inner.get(name) is not None:
                raise ModelError(
                    f"{file}: {place}{name} = {shown(inner[name])} is computed by no backend, so"
                    " this model cannot be trained"
                )
    for place, name in (
        ("vision_config", "patch_size"),
        ("vision_config", "temporal_patch_size"),
        ("vision_config", "image_size"),
    ):
        if not isinstance(vision.get(name, 1), int):
            raise ModelError(
                f"{file}: {place}.{name} = {shown(vision[name])} is not supported; only one number"
                " for all sides is"
            )
    if vision.get("out_hidden_size", text["hidden_size"]) != text["hidden_size"]:
        raise ModelError(
            f"{file}: vision_config.out_hidden_size = {vision['out_hidden_size']} is not"
            f" text_config.hidden_size = {text['hidden_size']}, so image features do not fit"
            " between the embeddings"
        )
    width = text["hidden_size"] // text["num_attention_heads"]
    if config["model_type"] == "qwen2_5_vl" and text.get("head_dim") not in (None, width):
        raise ModelError(
            f"{file}: text_config.head_dim = {shown(text['head_dim'])} is not hidden_size /"
            f" num_attention_heads = {width}"
        )
    rope = text.get("rope_parameters") or {}
    section, sections = "text_config.rope_parameters.mrope_section", rope.get("mrope_section")
    half = int((text.get("head_dim") or width) * (rope.get("partial_rotary_factor") or 1.0)) // 2
    if sections is not None and (not isinstance(sections, list | tuple) or len(sections) != 3):
        raise ModelError(
            f"{file}: {_named(section, written)} = {shown(sections)} is not three numbers"
        )
    # Interleaved sections (other families) need not add up: angles in neither the height nor the
    # width section belong to time.
    if sections is not None and config["model_type"] == "qwen2_5_vl" and sum(sections) != half:
        raise ModelError(
            f"{file}: {_named(section, written)} = {shown(sections)} does not add up to {half}"
        )
    kinds = text.get("layer_types") or []
    if "layer_types" in text and len(kinds) < text["num_hidden_layers"]:
        raise ModelError(
            f"{file}: text_config.layer_types names {len(kinds)} layers, and num_hidden_layers is"
            f" {text['num_hidden_layers']}"
        )
    allowed = {"qwen3_5": {"linear_attention", "full_attention"}}.get(
        config["model_type"], {"sliding_attention", "full_attention"}
    )
    strange = sorted({str(kind) for kind in kinds} - allowed)
    if strange:
        raise ModelError(
            f"{file}: text_config.layer_types names '{strange[0]}', which is none of"
            f" {', '.join(sorted(allowed))}"
        )
    if "sliding_attention" in kinds and text.get("sliding_window") is None:
        raise ModelError(
            f"{file}: text_config.layer_types names sliding_attention, and no sliding_window is set"
        )


def _values(setting: Setting | None, backend: str) -> Values:
    return () if setting is None else getattr(setting, backend)


def _flat(config: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of every setting; other dictionaries, such as maps of labels, are
    one value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and key in (
            "text_config",
            "vision_config",
            "rope_parameters",
            "full_attention",
            "sliding_attention",
        ):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal, where a list equals a tuple but True does not equal 1."""
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return list(one) == list(other)
    return bool(one == other)


def _named(key: str, written: Mapping[str, Any]) -> str:
    """The name of a key in the file as written: older files say rope_scaling, and some hold the
    text settings at the top level."""
    place, _, name = key.rpartition(".")
    parts = place.split(".")
    if "rope_parameters" in parts:
        inner = written.get(parts[0], {}) if parts[0] in written else written
        if (
            isinstance(inner, Mapping)
            and "rope_parameters" not in inner
            and "rope_scaling" in inner
        ):
            at = f"{parts[0]}." if parts[0] in written else ""
            old = inner["rope_scaling"]
            older = name == "rope_type" and isinstance(old, Mapping) and "type" in old
            return f"{at}rope_scaling.{'type' if older else name}"
    if place == "text_config" and "text_config" not in written:
        return name
    return key
