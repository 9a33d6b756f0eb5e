"""Recognises data of other programs that no format of opd reads, so that the message names the
format and not a missing field of ours."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from opd.data.fields import Row
from opd.errors import DataError

CONVERT = "write its rows as opd reads them (docs/data.md)"

ROWS: Sequence[tuple[str, tuple[str, ...], tuple[str, ...]]] = (
    ("Vision-OPD-6K or ZwZ-RL-VQA", ("problem",), ("images", "bbox")),
    ("LLaVA's conversations", ("conversations",), ()),
    ("ms-swift's or OpenAI's messages", ("messages",), ()),
    ("COCO's annotations", ("annotations",), ("images",)),
    ("Visual-CoT", ("bboxs",), ("image", "question")),
    ("TreeBench", ("target_instances",), ("image", "question")),
    ("V-Zero", ("teacher_raw_prompt",), ("prompt", "images", "teacher_images")),
    ("verl's rows", ("reward_model",), ("prompt", "images")),
    ("MME-RealWorld", ("multi-choice options",), ("bytes", "question")),
    ("MME-RealWorld", ("Answer choices",), ("Image", "Text", "Ground truth")),
    ("ZoomBench", ("query", "response"), ("image",)),
    ("TRL's prompts", ("prompt",), ("images",)),
    ("TRL's rows", ("solution",), ("prompt", "images")),
    ("ms-swift's queries", ("query",), ("images",)),
    ("V*", ("text", "label"), ("image", "question_id")),
    ("an instruction data set", ("instruction",), ("image", "question")),
)
"""Names of formats, the fields by which a row shows its format, and the others that a row needs to
be read; the first match counts."""

SIGNATURES = (
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"SQLite format 3", "SQLite"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"\x89PNG", "a PNG picture"),
    (b"%PDF", "PDF"),
)

MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
"""Byte order marks, and their encodings."""


def check_row(row: Row) -> None:
    """Raises DataError for a row in a format of ROWS, unless it has our fields image and
    question."""
    if row.get("question") is not None and (
        row.get("image") is not None or row.get("images") is not None
    ):
        return
    for name, fields, needs in ROWS:
        if all(row.get(field) is not None for field in fields):
            lacking = [f"'{field}'" for field in needs if row.get(field) is None]
            named = " and ".join(f"'{field}'" for field in fields)
            raise DataError(
                f"this looks like {name} (field{'s' if len(fields) > 1 else ''} {named})"
                + (f" without {' and '.join(lacking)}" if lacking else ", which is not read here")
                + f"; {CONVERT}, or name its columns (data.columns)"
            )


def check_file(path: Path, content: bytes) -> None:
    """Raises DataError for a file of a known kind that is not JSON lines in UTF-8."""
    for mark, name in MARKS:
        if content.startswith(mark):
            raise DataError(f"{path}: the file is {name} text; save it as UTF-8")
    for start, name in SIGNATURES:
        if content.startswith(start):
            raise DataError(f"{path}: the file is not UTF-8 text but {name}; {CONVERT}")
    head = content[:4096]
    if b"\0" in head:
        wide = head.count(b"\0") * 3 > len(head)
        raise DataError(
            f"{path}: the file is"
            f" {'UTF-16 text; save it as UTF-8' if wide else 'binary, not JSON lines in UTF-8'}"
        )
