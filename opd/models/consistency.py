"""Checks that config.json, weights, tokenizer and image processor of a model folder belong to one
model.

Each file may be valid and yet belong to another model. Every check raises a ModelError of one line
that names file and key, before anything is allocated or written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from opd.errors import ModelError, one_line, plural, shortened
from opd.models import weight_formats
from opd.models.files import StoredTensor, tensor_headers

SECTIONS = ("", "text_config", "vision_config")

SIZES = {
    2**24: (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "out_hidden_size",
        "max_position_embeddings",
        "num_position_embeddings",
    ),
    2**16: (
        "num_attention_heads",
        "num_key_value_heads",
        "num_heads",
        "head_dim",
        "image_size",
        "mm_tokens_per_image",
    ),
    2**12: (
        "num_hidden_layers",
        "depth",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "scale_factor",
    ),
    2**8: ("num_channels", "in_channels"),
}
"""Keys of config.json that hold sizes, by the largest value that is accepted; published models stay
far below."""

TOKENS = {
    "image_token_id": "image_token",
    "image_token_index": "image_token",
    "video_token_id": "video_token",
    "vision_start_token_id": "vision_start_token",
    "vision_end_token_id": "vision_end_token",
    "boi_token_index": "boi_token",
    "eoi_token_index": "eoi_token",
}
"""Keys of config.json that hold a token id, and the attribute of a tokenizer that holds the
token."""

SWITCHES = (
    "do_resize",
    "do_rescale",
    "do_normalize",
    "do_convert_rgb",
    "do_pad",
    "do_image_splitting",
    "do_pan_and_scan",
)
"""Settings of an image processor that turn a step on or off. The text "false" would count as true,
so they must be booleans."""

ENLARGED = 2**24
"""Largest accepted lower bound on an image's pixels. A larger one would fill the memory with
enlarged images."""


def check_sizes(file: Path, config: Mapping[str, Any]) -> None:
    """Raises ModelError if config.json holds a number that no model has: beyond 2^53, not finite,
    or a size outside of SIZES."""
    for name, value in _numbers(config, ""):
        if abs(value) > 2**53 or not math.isfinite(value):
            raise ModelError(
                f"{file}: {name} is {_short(value)}, which no model has; take the model's own file"
            )
    for section in SECTIONS:
        inner = config.get(section) if section else config
        if not isinstance(inner, dict):
            continue
        for largest, keys in SIZES.items():
            for key in keys:
                size: Any = inner.get(key)
                if isinstance(size, list | dict | None):
                    continue  # sides of an image, or a model that counts each layer's heads
                if type(size) is not int or not 1 <= size <= largest:
                    where = f"{section}.{key}" if section else key
                    raise ModelError(
                        f"{file}: {where} is {_short(size)}, not a whole number between 1 and"
                        f" {largest:,}"
                    )


def complete(file: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` completed by the defaults of transformers. Raises ModelError if transformers refuses
    it."""
    from transformers import AutoConfig

    try:
        # transformers would read MLX's quantisation settings as settings of transformers.
        return dict(AutoConfig.for_model(**weight_formats.without_quantisation(config)).to_dict())
    except Exception as error:  # transformers raises TypeError, KeyError, ValueError and others
        raise ModelError(f"{file} cannot be used: {one_line(error)}") from error


def check_weights(folder: Path, config: Mapping[str, Any]) -> int | None:
    """Checks layers and embedding in the headers of the weights against `config`, a completed
    config.json.

    Returns the number of rows of the embedding; None if the folder holds no weights yet, or no
    embedding. Raises ModelError if the weights belong to another model than `config`.
    """
    if not any(folder.glob("*.safetensors")):
        return None
    tensors = tensor_headers(folder)
    layers = [
        (config.get(section) or {}).get(key)
        for section, key in (("text_config", "num_hidden_layers"), ("vision_config", "depth"))
    ]
    if sum(count for count in layers if isinstance(count, int)) > len(tensors):
        most, held = max(layers, key=lambda count: count or 0), plural(len(tensors), "tensor")
        raise ModelError(
            f"{folder}: config.json describes {most:,} layers, and the weights hold {held}; they"
            " are of two models"
        )
    text = config.get("text_config") or config
    for name, tensor in tensors.items():
        if name.endswith("embed_tokens.weight") and len(tensor.shape) == 2:
            _check_table(folder, name, tensor, text)
            return tensor.shape[0]
    return None


def _check_table(folder: Path, name: str, tensor: StoredTensor, text: Mapping[str, Any]) -> None:
    """Raises ModelError if the shape of the embedding is not [vocab_size, hidden_size]."""
    rows, width = tensor.shape
    for key, stored in (("vocab_size", rows), ("hidden_size", width)):
        stated = text.get(key)
        packed = key == "hidden_size" and not tensor.dtype.startswith(("F", "BF"))
        if isinstance(stated, int) and stated != stored and not packed:
            raise ModelError(
                f"{folder / 'config.json'}: {key} is {stated:,}, but {name} in {tensor.file} is"
                f" {rows:,} x {width:,}; the two files are of two models"
            )


def check_tokens(folder: Path, tokenizer: Any, rows: int) -> None:
    """Raises ModelError if the tokenizer has a token with an id of at least `rows`, the number of
    rows of the embedding.

    The padding token may have such an id, since prompts are never padded.
    """
    beyond = sorted(
        (number, token) for token, number in tokenizer.get_vocab().items() if number >= rows
    )
    beyond = [(number, token) for number, token in beyond if token != tokenizer.pad_token]
    if beyond:
        number, token = beyond[0]
        more = f", and {len(beyond) - 1} more are" if len(beyond) > 1 else ""
        raise ModelError(
            f"{folder}: the tokenizer's token {_short(repr(token))} has the id {number:,}{more},"
            f" beyond the embedding's {rows:,} rows; take the tokenizer of this model, or enlarge"
            " the embedding with resize_token_embeddings of transformers"
        )


def check_ids(
    folder: Path,
    stated: Mapping[str, Any],
    config: Mapping[str, Any],
    image: tuple[str, int],
    tokenizer: Any,
) -> None:
    """Raises ModelError if a token id in config.json is not the tokenizer's id of the same token.

    `stated`: config.json as written; `config`: completed by defaults. `image`: the image token and
    its id. The image token's id is checked in `config`, since it places the image features; the
    other ids only where they are stated.
    """
    vocabulary = tokenizer.get_vocab()
    for key, name in TOKENS.items():
        held = stated.get(key, config.get(key) if name == "image_token" else None)
        if held is None:
            continue
        token, number = image if name == "image_token" else (getattr(tokenizer, name, None), None)
        if number is None:
            token = token or {"video_token": "<|video_pad|>"}.get(
                name, f"<|{name.removesuffix('_token')}|>"
            )
            number = vocabulary.get(token)
        if number is not None and held != number:
            raise ModelError(
                f"{folder / 'config.json'}: {key} is {_short(held)}, but the tokenizer's '{token}'"
                f" has the id {number}; the two are of two models"
            )


def stop_ids(file: Path, held: Any, rows: int | None) -> list[int]:
    """The ids that `held`, a file's `eos_token_id`, lists: an id, a list of ids, or None.

    Raises ModelError for a value that is not an id, or is not below `rows`.
    """
    ids = [] if held is None else held if isinstance(held, list) else [held]
    for number in ids:
        if type(number) is not int or not 0 <= number < (rows or 2**31):
            bound = f" below {rows:,}, the rows of the embedding" if rows else ""
            raise ModelError(
                f"{file}: eos_token_id holds {_short(number)}; it is the id of a token{bound}, or a"
                " list of ids"
            )
    return ids


def check_equal(file: Path, key: str, held: Any, config_key: str, wanted: Any) -> None:
    """Raises ModelError if `held`, the processor's setting `key`, is not the value `wanted`, which
    the vision tower has in config.json under `config_key`."""
    if held != wanted or isinstance(held, bool):
        raise ModelError(
            f"{file}: {key} is {_short(held)}, but {config_key} in config.json is {_short(wanted)};"
            " the processor is of another model"
        )


def check_channels(file: Path, processor: Any, channels: Any) -> None:
    """Raises ModelError if the processor's mean and standard deviation are not one number for each
    of `channels`, if rescale_factor is not positive, or if a setting of SWITCHES is not a
    boolean."""
    for name in SWITCHES:
        held = getattr(processor, name, None)
        if not isinstance(held, bool | None):
            raise ModelError(f"{file}: {name} is {_short(held)}, neither true nor false")
    factor = getattr(processor, "rescale_factor", 1)
    if not isinstance(factor, int | float) or isinstance(factor, bool) or not factor > 0:
        raise ModelError(f"{file}: rescale_factor is {_short(factor)}, not a number above 0")
    for name in ("image_mean", "image_std"):
        values = getattr(processor, name, None)
        if values is None or isinstance(values, int | float):
            continue
        if (
            not isinstance(values, list | tuple)
            or len(values) != channels
            or not all(isinstance(value, int | float) for value in values)
        ):
            raise ModelError(
                f"{file}: {name} is {_short(values)}, but images have {channels} channels; the"
                " processor is of another model"
            )
        if name == "image_std" and not all(value > 0 for value in values):
            raise ModelError(
                f"{file}: image_std is {_short(values)}, and pixels are divided by it; take the"
                " model's own file"
            )


def check_switch(file: Path, processor: Any, name: str, wanted: bool) -> None:
    """Raises ModelError if the processor's switch `name` is not `wanted`, as tower or prompt need
    it."""
    if bool(getattr(processor, name, wanted)) is not wanted:
        raise ModelError(
            f"{file}: {name} is {not wanted}, which is not supported for this model; set it to"
            f" {str(wanted).lower()}"
        )


def edges(size: Any) -> dict[str, Any]:
    """A processor's `size` as a dictionary of edges; empty if `size` is anything else."""
    try:
        return dict(size)
    except (TypeError, ValueError):
        return {}


def check_edge(file: Path, key: str, held: Any, largest: int) -> None:
    """Raises ModelError if `held`, an edge in pixels, is not a whole number in 1..`largest`."""
    if type(held) is not int or not 1 <= held <= largest:
        raise ModelError(
            f"{file}: {key} is {_short(held)}, not a whole number between 1 and {largest:,}"
        )


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float]]:
    """Yields dotted key and value of every number in nested JSON, whose depth `read_json`
    bounds."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield name, value
    pairs: Iterable[tuple[Any, Any]] = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, inner in pairs:
        yield from _numbers(inner, f"{name}.{key}" if name else str(key))


def _short(value: Any) -> str:
    value = list(value) if isinstance(value, tuple) else value
    text = value if isinstance(value, str) and value[:1] in "'\"" else repr(value)
    return shortened(text, 60)
