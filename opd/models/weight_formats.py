"""Detects quantised weights of a checkpoint, from the headers of the safetensors files and from
config.json.

The MLX backend reads MLX's own format; every other format raises ModelError. If config.json says
that weights are quantised and they are plain, as some conversions leave it, a warning is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd.errors import ModelError, shown
from opd.models import names
from opd.models.files import StoredTensor

PLAIN = {"F64", "F32", "F16", "BF16"}
"""Data types of weights that are not quantised, as safetensors names them."""

SETTINGS = ("quantization_config", "compression_config", "quantization")
"""Keys of config.json, at the top or in `text_config`, that say how weights are quantised."""

ENDS: Mapping[str, str] = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".g_idx": "gptq",
    ".weight_packed": "compressed-tensors",
    ".weight_zero_point": "compressed-tensors",
    ".weight_scale_inv": "fp8",
    ".weight_scale": "fp8",
    ".input_scale": "fp8",
    ".absmax": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_format": "bitsandbytes",
    ".W_q": "hqq",
    ".scales": "mlx",
}
"""Suffixes of tensor names that only quantised checkpoints have, and the formats that write
them."""


PARTS = ("text_config", "vision_config")
"""Sections of config.json that may hold the keys of SETTINGS too."""


def settings(config: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The quantisation settings of config.json, by dotted key."""
    return {
        key: value for key, value in _stated(config).items() if isinstance(value, dict) and value
    }


def check_settings(file: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError if config.json has a quantisation setting that is not an object."""
    for key, value in _stated(config).items():
        if value is not None and not isinstance(value, dict):
            raise ModelError(
                f"{file}: {key} is {shown(value)}, not an object of settings; "
                "remove the key if the weights are plain, else name the original model"
            )


def mlx_settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The settings with which MLX quantised the weights, such as `group_size` and `bits`; None if
    config.json has none of MLX."""
    for key in ("quantization", "quantization_config"):
        stated = config.get(key)
        if (
            isinstance(stated, dict)
            and "group_size" in stated
            and "bits" in stated
            and "quant_method" not in stated
        ):
            return stated
    return None


def check(
    config: Mapping[str, Any],
    stored: Mapping[str, StoredTensor],
    folder: Path,
    reads_mlx: bool = False,
) -> None:
    """Raises ModelError if the `stored` weights are quantised; the message names the format. MLX's
    format is accepted if `reads_mlx`.

    Logs a warning if config.json says that weights are quantised and they are plain.
    """
    check_settings(folder / "config.json", config)
    kind = str(config.get("model_type"))
    weights = {
        name: tensor.dtype for name, tensor in stored.items() if not names.is_left_out(kind, name)
    }
    packed = next((name for name in sorted(weights) if _format(name)), None)
    odd = next((name for name in sorted(weights) if weights[name] not in PLAIN), None)
    said = settings(config)
    if packed is None and odd is None:
        if said:
            logging.getLogger(__name__).warning(
                "%s: %s says that the weights are quantised (%s), but they are plain, so it is"
                " ignored",
                folder / "config.json",
                next(iter(said)),
                _method(next(iter(said.values()))),
            )
        return
    mlx = mlx_settings(config) is not None
    if mlx and reads_mlx:
        return
    if mlx:
        raise ModelError(
            f"{folder}: these weights are quantised for MLX; train them with --backend mlx, or take"
            " the original checkpoint"
        )
    if said:
        method = _method(next(iter(said.values())))
    elif packed:
        method = _format(packed) or ""
    else:
        assert odd is not None
        method = f"{'fp8' if weights[odd].startswith('F8') else weights[odd]}, without scales"
    first = packed or odd
    raise ModelError(
        f"{folder}: these weights are quantised ({method}; the first is {first}): name the original"
        " model, which is not"
    )


def without_quantisation(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a config.json without the keys of SETTINGS."""
    plain = {key: value for key, value in config.items() if key not in SETTINGS}
    return {
        key: (
            {name: inner for name, inner in value.items() if name not in SETTINGS}
            if key in PARTS and isinstance(value, dict)
            else value
        )
        for key, value in plain.items()
    }


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of config.json under the keys of SETTINGS, by dotted key."""
    places = {"": config} | {
        f"{name}.": value for name in PARTS if isinstance(value := config.get(name), dict)
    }
    return {
        f"{at}{key}": place[key] for at, place in places.items() for key in SETTINGS if key in place
    }


def _method(said: Mapping[str, Any]) -> str:
    """The usual name of the format that quantisation settings describe."""
    method = str(
        said.get("quant_method")
        or ("mlx" if "group_size" in said and "bits" in said else "an unknown format")
    )
    return (
        f"{method}, {said['format']}"
        if method == "compressed-tensors" and isinstance(said.get("format"), str)
        else method
    )


def _format(name: str) -> str | None:
    """The format that writes tensors of this name; None for a plain tensor."""
    return next(
        (method for end, method in ENDS.items() if name.endswith(end)),
        "bitsandbytes" if ".quant_state." in name else None,
    )
