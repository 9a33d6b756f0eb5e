"""Fields of a JSON row, with their types checked; null means absent everywhere, as converters write it for what they lack.

A fault is a DataError that names the field, shows the value, and says what would be right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import DataError, nearest

Row: TypeAlias = Mapping[str, Any]

LARGEST = 1e300
"""Numbers beyond this are treated as infinite: JSON integers may exceed any float."""


def text(row: Row, field: str, wanted: str = "a text that is not empty") -> str | None:
    """A text that is not blank; `wanted` is what the error calls it."""
    found = row.get(field)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise wrong(field, found, wanted)
    return found


def texts(row: Row, field: str, wanted: str = "a list of texts") -> tuple[str, ...]:
    """A list of texts, none of them blank; empty where there is none."""
    found = row.get(field)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(entry, str) and entry.strip() for entry in found):
        raise wrong(field, found, wanted)
    return tuple(found)


def paths(row: Row, singular: str, folder: Path) -> tuple[Path, ...]:
    """The path in field `singular`, or the list of paths in its plural, relative to `folder`; empty where there is neither."""
    plural = f"{singular}s"
    if row.get(singular) is not None and row.get(plural) is not None:
        raise DataError(f"fields '{singular}' and '{plural}': give one of them, not both")
    one = text(row, singular, "a path")
    return tuple(folder / path for path in ((one,) if one else texts(row, plural, "a list of paths")))


def is_number(value: Any) -> bool:
    """True for numbers, the infinite ones and NaN too; Python's bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for numbers that a float can hold."""
    return is_number(value) and -LARGEST < value < LARGEST


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def show(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    shown = json.dumps(value, ensure_ascii=False)
    return shown if len(shown) <= 60 else shown[:57] + "..."


def wrong(field: str, value: Any, wanted: str) -> DataError:
    """The error for a value of a wrong type."""
    return DataError(f"field '{field}': {show(value)} is not {wanted}")


def missing(row: Row, field: str, wanted: str, known: Sequence[str]) -> DataError:
    """The error for an absent field; names a field of the row that looks like a misspelt one."""
    for name in row:
        if name not in known and (hint := nearest(name, known)).startswith("did you mean"):
            return DataError(f"field '{field}' is missing: {wanted} (the row has '{name}'; {hint})")
    return DataError(f"field '{field}' is missing: {wanted}")
