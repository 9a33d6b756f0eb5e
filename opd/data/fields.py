"""Reads and checks fields of a JSON row. A field that is null counts as absent, since converters
write null for missing values.

A fault raises a DataError that names the field, shows the value, shortened, and says what is
expected.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from opd.errors import DataError, shortened

Row: TypeAlias = Mapping[str, Any]

LARGEST = 1e300
"""Numbers beyond this count as infinite, since JSON integers may exceed any float."""

SHOWN = 60
"""Number of characters of a value or name that a message shows."""

FIELDS = (
    "image",
    "images",
    "question",
    "boxes",
    "box_format",
    "box_image",
    "box_size",
    "teacher_image",
    "teacher_images",
    "teacher_question",
    "answer",
    "choices",
    "id",
    "weight",
    "located",
)
"""The fields of a row."""

ALIASES = {
    **dict.fromkeys(("bbox", "bboxes", "bounding_box", "bounding_boxes", "bboxs"), "boxes"),
    **dict.fromkeys(
        ("img", "image_path", "image_file", "file_name", "filename", "picture", "photo"), "image"
    ),
    **dict.fromkeys(("prompt", "query", "instruction", "text"), "question"),
    **dict.fromkeys(("label", "solution", "response", "ground_truth", "gt", "target"), "answer"),
    **dict.fromkeys(("options", "candidates"), "choices"),
}
"""Names of fields in other formats, and our names for the same fields."""

OTHERS = {
    "height",
    "width",
    "image_id",
    "question_id",
    "image_size",
    "image_width",
    "image_height",
    "question_type",
    "answer_type",
    "messages",
    "conversations",
    "extra_info",
}
"""Names that are similar to ours but mean something else."""


def text(row: Row, field: str, wanted: str = "a text that is not empty") -> str | None:
    """The text of a field, which must not be blank; None if the field is absent. `wanted`: the
    expected value in words. Raises DataError."""
    value = row.get(field)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise wrong(field, value, wanted)
    return whole(field, value)


def texts(row: Row, field: str, wanted: str = "a list of texts") -> tuple[str, ...]:
    """The list of texts of a field, none of them blank; empty if the field is absent. `wanted`: the
    expected value in words. Raises DataError."""
    values = row.get(field)
    if values is None:
        return ()
    if not isinstance(values, list) or not all(
        isinstance(entry, str) and entry.strip() for entry in values
    ):
        raise wrong(field, values, wanted)
    return tuple(str(whole(field, entry)) for entry in values)


def whole(field: str, value: str | None) -> str | None:
    """Returns `value`. Raises DataError if it holds half of a surrogate pair, which tokenizers and
    files cannot hold."""
    if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"field '{field}': {show(value)} holds half of a character (a lone surrogate); write"
            " the whole one, or remove it"
        )
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a number, which may be infinite or NaN. A bool is not a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """Whether a value is a number that a float can hold."""
    return is_number(value) and -LARGEST < value < LARGEST


def kind(value: Any) -> str:
    """The type of a JSON value, or of bytes, in words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
        bytes: "bytes",
    }
    return names.get(type(value), "a number" if is_number(value) else type(value).__name__)


def show(value: Any) -> str:
    """A JSON value for a message, shortened to SHOWN characters."""
    if isinstance(value, str):
        value = value[: 2 * SHOWN]  # json.dumps would copy megabytes of an image in base64
    return cut(json.dumps(value, ensure_ascii=False, skipkeys=True, default=kind))


def cut(text: str) -> str:
    """A text for a message, shortened to SHOWN characters, without halves of surrogate pairs."""
    return shortened(text, SHOWN).encode("utf-8", "backslashreplace").decode()


def wrong(field: str, value: Any, wanted: str) -> DataError:
    """The DataError for a field with a wrong value; `wanted`: the expected value in words."""
    return DataError(f"field '{field}': {show(value)} is not {wanted}")


def missing(row: Row, field: str, wanted: str, known: Sequence[str]) -> DataError:
    """The DataError for an absent field, which also names a field of the row that may be a
    misspelling of it."""
    for name in row:
        if name not in known and (near := nearest_field(name, known)):
            return DataError(
                f"field '{field}' is missing: {wanted} (the row has '{cut(name)}'; did you mean"
                f" '{near}'?)"
            )
    return DataError(f"field '{field}' is missing: {wanted}")


def nearest_field(name: str, known: Sequence[str]) -> str:
    """The known field that an unknown name most likely means; empty if none is near."""
    plain = re.sub(r"[\W_]+", "_", name[:100]).strip("_").lower()
    if plain in known:
        return plain
    if plain in OTHERS:
        return ""
    if ALIASES.get(plain) in known:
        return ALIASES[plain]
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.65)
    return close[0] if close else ""
