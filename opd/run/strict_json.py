"""Writes JSON that every reader accepts: null for numbers that are not finite, and escapes for
characters that are not valid Unicode or that steer a terminal."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

STEERING = re.compile(
    "[\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff\U000e0000-\U000e0fff]"
)
"""Matches characters that may steer a terminal which prints the file, and halves of surrogate
pairs, which UTF-8 cannot encode."""


def dumps(value: Any, indent: int | None = None, ascii_only: bool = False) -> str:
    r"""`value` as JSON, on one line, or on several with `indent`. A reader gets the same values
    back, with None for nan and infinity.

    Characters of STEERING are written as \uXXXX; with `ascii_only` all characters beyond ASCII are.
    """
    text = json.dumps(finite(value), indent=indent, ensure_ascii=ascii_only, allow_nan=False)
    return STEERING.sub(lambda match: "".join(f"\\u{unit:04x}" for unit in _units(match[0])), text)


def finite(value: Any) -> Any:
    """`value` with None in place of every number that is not finite, at any depth."""
    if isinstance(value, float):  # numpy's float64 too
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _units(character: str) -> list[int]:
    """The one or two UTF-16 code units of a character."""
    code = ord(character)
    if code < 0x10000:
        return [code]
    return [0xD800 + ((code - 0x10000) >> 10), 0xDC00 + ((code - 0x10000) & 0x3FF)]
