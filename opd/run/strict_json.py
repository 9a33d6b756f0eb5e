"""JSON that every reader takes: numbers that are not finite are null, and text that is no Unicode
stays an escape."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

STEERING = re.compile(
    "[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)
"""What may steer a terminal that prints the file, and halves of surrogate pairs, which no file in
UTF-8 can hold."""


def dumps(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    r"""`value` as JSON on one line, or over several with `indent`. Reading it gives the same
    values, None for nan and infinity.

    Characters that steer a terminal are written as \uXXXX, with `ascii_only` all beyond ASCII.
    """
    text = json.dumps(finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return STEERING.sub(lambda found: "".join(f"\\u{unit:04x}" for unit in _units(found[0])), text)


def finite(value: Any) -> Any:
    """`value` with None for every number in it that is not finite."""
    if isinstance(value, float):  # numpy's float64 too
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else value


def _units(letter: str) -> list[int]:
    """The letter's one or two units of UTF-16."""
    code = ord(letter)
    return (
        [code]
        if code < 0x10000
        else [0xD800 + ((code - 0x10000) >> 10), 0xDC00 + ((code - 0x10000) & 0x3FF)]
    )
