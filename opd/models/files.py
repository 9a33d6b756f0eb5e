"""Reads the files of a model folder with bounds.

A folder may come from anybody, so no file in it may lead outside of the folder, hang the process or
fill the memory. Headers of safetensors are read without torch or mlx: a header is JSON after eight
bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from opd.errors import ModelError, UserError, no_weights, one_line, shortened
from opd.paths import check_file

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"

JSON_BYTES = 64 * 2**20
"""Largest JSON file that is read; the largest index of a published model has about 10 MiB."""

HEADER_BYTES = 100 * 2**20
"""Largest header of a safetensors file that is read; the format allows no more."""

DEPTH = 32
"""Largest depth of nested objects and lists. Published files have at most 8 levels; the libraries
that read them recurse."""

WIDTHS = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}
"""Bytes of an element by the data type's name in safetensors; 8-bit floats and smaller types are
not listed."""


class StoredTensor(NamedTuple):
    """A tensor as a header describes it: `dtype` by its name in safetensors ("F32", "BF16"), shape,
    and the name of the file that holds it."""

    dtype: str
    shape: tuple[int, ...]
    file: str


def read_json(path: Path, error: type[UserError] = ModelError) -> dict[str, Any]:
    """The object in a JSON file of at most JSON_BYTES and DEPTH. Raises `error`, of one line."""
    if not path.is_file():  # reading a pipe or a device would never end
        raise error(f"{path} is missing" if not path.exists() else f"{path} is not a file")
    try:
        size = path.stat().st_size
        if size > JSON_BYTES:
            raise error(
                f"{path} has {size:,} bytes, more than any such file needs ({JSON_BYTES:,})"
            )
        return parse_json(path.read_bytes(), str(path), error)
    except OSError as reason:
        raise error(f"{path} cannot be read: {reason.strerror or reason}") from reason


def parse_json(content: bytes, name: str, error: type[UserError] = ModelError) -> dict[str, Any]:
    """The object that `content` holds in JSON, nested at most DEPTH levels. Raises `error`, whose
    message begins with `name`."""
    try:
        parsed = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise error(f"{name} is nested deeper than {DEPTH} levels") from None
    except ValueError as reason:  # wrong syntax or encoding, or a number of thousands of digits
        raise error(f"{name} is not JSON: {one_line(reason)}") from reason
    if not isinstance(parsed, dict):
        raise error(f"{name} does not hold a JSON object")
    level: list[Any] = [parsed]
    for _ in range(DEPTH):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return parsed
    raise error(f"{name} is nested deeper than {DEPTH} levels")


def check_links(folder: Path) -> None:
    """Raises ModelError if a symbolic link in a model folder leads outside of the folder.

    An export would copy the target of the link. A snapshot in a Hugging Face cache may link to the
    blobs of the same model.
    """
    home = folder.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for place in (folder, folder / "additional_chat_templates"):
        for entry in sorted(place.iterdir()) if place.is_dir() else ():
            if not entry.is_symlink():
                continue
            try:
                target = entry.resolve(strict=True)
            except (OSError, RuntimeError):  # RuntimeError: a circle of links, before Python 3.13
                raise ModelError(
                    f"{entry} is a link that leads nowhere; put the file itself there"
                ) from None
            if not any(target.is_relative_to(allowed) for allowed in homes):
                raise ModelError(
                    f"{entry} is a link to {target}, outside of the model folder; put the file"
                    " itself there"
                )


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that hold a model's weights, chosen as transformers chooses
    them.

    Raises ModelError if a file is missing or lies outside of the folder.
    """
    return sorted(set(_owners(folder).values())) if _indexed(folder) else [_checked(folder, SINGLE)]


def tensor_headers(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder's weights, by name, read from the headers alone.

    Raises ModelError if a file is missing, truncated or not safetensors, or if the index names a
    file outside of the folder, or a tensor that the named file does not hold.
    """
    owners = _owners(folder) if _indexed(folder) else {}
    tensors: dict[str, StoredTensor] = {}
    for file in weight_files(folder):
        for name, tensor in _header(folder, file).items():
            if owners.get(name, file) == file:
                tensors[name] = tensor
    for name, file in owners.items():
        if name not in tensors:
            raise ModelError(
                f"{folder / INDEX}: {file} does not hold the tensor {shortened(name, 120)};"
                " download both again"
            )
    return tensors


def _indexed(folder: Path) -> bool:
    return (folder / INDEX).is_file() and not (folder / SINGLE).exists()


def _owners(folder: Path) -> dict[str, str]:
    """The name of the file that holds each tensor, as the index says it. Raises ModelError if one
    is not a file in the folder."""
    path = folder / INDEX
    owners = read_json(path).get("weight_map")
    if not isinstance(owners, dict) or not owners:
        raise ModelError(f"{path} has no weight_map, which names the file of each tensor")
    for name, file in owners.items():
        if not isinstance(file, str) or not file.endswith(".safetensors"):
            what = f"{shortened(repr(file), 120)} for {shortened(name, 120)}"
            raise ModelError(
                f"{path}: weight_map gives {what}; it names files in the folder, *.safetensors"
            )
    for file in sorted(set(owners.values())):
        _checked(folder, file)
    return owners


def _checked(folder: Path, file: str) -> str:
    """Returns `file`, a name. Raises ModelError if it is not a file in the folder."""
    if Path(file).name != file or "\\" in file or "\0" in file:
        raise ModelError(
            f"{folder / INDEX}: weight_map names {shortened(repr(file), 120)}, outside of the model"
            " folder; weights stand beside it"
        )
    if not (folder / file).is_file():
        raise no_weights(folder, file)
    return file


def _header(folder: Path, file: str) -> dict[str, StoredTensor]:
    """The tensors that the header of one file describes, by name."""
    path = folder / file
    try:
        check_file(path)
        with path.open("rb") as opened:
            size = path.stat().st_size
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(HEADER_BYTES, size - 8):
                raise ModelError(
                    f"{path} cannot be read as safetensors: it has {size:,} bytes, and a header of"
                    f" {length:,}"
                )
            content = parse_json(
                opened.read(length), f"{path} cannot be read as safetensors: the header"
            )
    except OSError as reason:
        raise ModelError(f"{path} cannot be read: {reason.strerror or reason}") from reason
    content.pop("__metadata__", None)
    return {name: _stored(path, name, value, size - 8 - length) for name, value in content.items()}


def _stored(path: Path, name: str, value: Any, data_bytes: int) -> StoredTensor:
    """The entry `value` of a header; `data_bytes`: bytes of the file after the header. Raises
    ModelError if the entry is malformed or does not lie within these bytes."""
    fields: dict[str, Any] = value if isinstance(value, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
    if (
        not isinstance(dtype, str)
        or not _counts(shape)
        or not _counts(offsets)
        or len(offsets) != 2
    ):
        raise ModelError(
            f"{path} cannot be read as safetensors: the header says nothing usable of"
            f" {shortened(name, 120)}"
        )
    begin, end = offsets
    if not begin <= end <= data_bytes:
        raise ModelError(
            f"{path} is cut off: {shortened(name, 120)} ends at byte {end:,} of {data_bytes:,};"
            " download it again"
        )
    if dtype in WIDTHS and end - begin != WIDTHS[dtype] * math.prod(shape):
        raise ModelError(
            f"{path} cannot be read as safetensors: {shortened(name, 120)} has {end - begin:,}"
            f" bytes for {dtype} {tuple(shape)}"
        )
    return StoredTensor(dtype, tuple(shape), path.name)


def _counts(value: Any) -> TypeGuard[list[int]]:
    """Whether `value` is a list of whole numbers of at least 0."""
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
