"""Fields of a JSON row, with their types checked; null means absent everywhere, as converters write
it for what they lack.

A fault is a DataError that names the field, shows the value, cut where it is long, and says what
would be right.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from opd.errors import DataError, shortened

Row: TypeAlias = Mapping[str, Any]

LARGEST = 1e300
"""Numbers beyond this are treated as infinite: JSON integers may exceed any float."""

SHOWN = 60
"""Characters of a value, or of a name, that a message shows."""

ALIASES = {
    **dict.fromkeys(("bbox", "bboxes", "bounding_box", "bounding_boxes", "bboxs"), "boxes"),
    **dict.fromkeys(
        ("img", "image_path", "image_file", "file_name", "filename", "picture", "photo"), "image"
    ),
    **dict.fromkeys(("prompt", "query", "instruction", "text"), "question"),
    **dict.fromkeys(("label", "solution", "response", "ground_truth", "gt", "target"), "answer"),
    **dict.fromkeys(("options", "candidates"), "choices"),
}
"""What other formats call our fields."""

OTHERS = {
    *(
        "height",
        "width",
        "image_id",
        "question_id",
        "image_size",
        "image_width",
        "image_height",
        "question_type",
        "answer_type",
    ),
    *("messages", "conversations", "extra_info"),
}
"""Names that are near ours and mean something else."""

_PICTURE = re.compile(
    r"(iVBORw0KGgo|/9j/|R0lGOD|UklGR|Qk[0-9A-Za-z]|SUkq|TU0A)[A-Za-z0-9+/=\s]{40,}"
)
_BASE64 = re.compile(r"[A-Za-z0-9+/_=\s-]{1024,}")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def text(row: Row, field: str, wanted: str = "a text that is not empty") -> str | None:
    """A text that is not blank; `wanted` is what the error calls it."""
    found = row.get(field)
    if found is not None and (not isinstance(found, str) or not found.strip()):
        raise wrong(field, found, wanted)
    return whole(field, found)


def texts(row: Row, field: str, wanted: str = "a list of texts") -> tuple[str, ...]:
    """A list of texts, none of them blank; empty where there is none."""
    found = row.get(field)
    if found is None:
        return ()
    if not isinstance(found, list) or not all(
        isinstance(entry, str) and entry.strip() for entry in found
    ):
        raise wrong(field, found, wanted)
    return tuple(str(whole(field, entry)) for entry in found)


def whole(field: str, value: str | None) -> str | None:
    """The text itself. Raises DataError where it holds half a character, which no tokenizer and no
    file can take."""
    if value is not None and any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(
            f"field '{field}': {show(value)} holds half of a character (a lone surrogate); write"
            " the whole one, or remove it"
        )
    return value


def paths(row: Row, singular: str, folder: Path) -> tuple[Path, ...]:
    """The path in field `singular`, or the list of paths in its plural; empty where there is
    neither.

    Paths are relative to `folder`; `~/` is the home folder. Raises DataError for what is a picture
    itself, or a URL.
    """
    plural = f"{singular}s"
    if row.get(singular) is not None and row.get(plural) is not None:
        raise DataError(f"fields '{singular}' and '{plural}': give one of them, not both")
    field = singular if row.get(singular) is not None else plural
    given = row.get(field)
    for entry in given if isinstance(given, list) else [given]:
        if isinstance(entry, dict) and entry.get("bytes"):
            raise DataError(
                f"field '{field}': a picture as bytes; save it to a file, and give its path"
            )
        if isinstance(entry, str) and _is_picture(entry):
            raise DataError(
                f"field '{field}': a picture as base64; save it to a file, and give its path"
            )
        if isinstance(entry, str) and _URL.match(entry):
            raise DataError(
                f"field '{field}': {show(entry)} is a URL; download the picture, and give its path"
            )
    one = text(row, singular, "a path")
    found = (one,) if one else texts(row, plural, "a list of paths")
    return tuple(
        folder / (os.path.expanduser(path) if path.startswith("~/") else path) for path in found
    )


def is_number(value: Any) -> bool:
    """True for numbers, the infinite ones and NaN too; Python's bool is none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finite(value: Any) -> bool:
    """True for numbers that a float can hold."""
    return is_number(value) and -LARGEST < value < LARGEST


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def show(value: Any) -> str:
    """A JSON value for a message, cut where it is long."""
    if isinstance(value, str):
        value = value[: 2 * SHOWN]  # before it is written out: a picture as text has megabytes
    return cut(json.dumps(value, ensure_ascii=False))


def cut(text: str) -> str:
    """A text for a message: without half characters, and cut where it is long."""
    return shortened(text, SHOWN).encode("utf-8", "backslashreplace").decode()


def wrong(field: str, value: Any, wanted: str) -> DataError:
    """The error for a value of a wrong type."""
    return DataError(f"field '{field}': {show(value)} is not {wanted}")


def missing(row: Row, field: str, wanted: str, known: Sequence[str]) -> DataError:
    """The error for an absent field; names a field of the row that looks like a misspelt one."""
    for name in row:
        if name not in known and (near := nearest_field(name, known)):
            return DataError(
                f"field '{field}' is missing: {wanted} (the row has '{cut(name)}'; did you mean"
                f" '{near}'?)"
            )
    return DataError(f"field '{field}' is missing: {wanted}")


def nearest_field(name: str, known: Sequence[str]) -> str:
    """The known field that an unknown name most likely means; empty where there is none."""
    plain = re.sub(r"[\W_]+", "_", name[:100]).strip("_").lower()
    if plain in known:
        return plain
    if plain in OTHERS:
        return ""
    if ALIASES.get(plain) in known:
        return ALIASES[plain]
    close = difflib.get_close_matches(plain, known, n=1, cutoff=0.65)
    return close[0] if close else ""


def _is_picture(value: str) -> bool:
    """Whether a text is a picture in base64, with or without the head of a data URI."""
    start = value.lstrip()[:2048]
    if start[:5].lower() == "data:":
        return True
    path_like = "." in start or start.count("/") * 10 > len(start) + 50
    return (_PICTURE.match(start) or _BASE64.match(start)) is not None and not path_like
