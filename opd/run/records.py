"""Reads and checks the .jsonl files of a run folder, which people may have edited or truncated.

A run that resumes from a damaged file would compare with answers that the model never gave.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opd.errors import FolderError, shown
from opd.measure.gap import Answered
from opd.run.folder import RunFolder

ANSWERS, ACCURACY, SKIPPED = "answers.jsonl", "accuracy.jsonl", "skipped.jsonl"
METRICS, ROLLOUTS = "metrics.jsonl", "rollouts.jsonl"

FIELDS: Mapping[str, Mapping[str, tuple[type, ...]]] = {
    ANSWERS: {
        "when": (str,),
        "id": (str,),
        "answer": (str, list, type(None)),
        "full": (str,),
        "crop": (str, type(None)),
        "full_right": (bool, type(None)),
        "crop_right": (bool, type(None)),
        "row": (int,),
    },
    ACCURACY: {"step": (int,), "rows": (int,)},
    SKIPPED: {"row": (str,), "reason": (str,), "kind": (str,)},
    METRICS: {
        "step": (int,),
        "taken": (bool,),
        **dict.fromkeys(("completions", "truncated", "dropped", "skipped"), (int,)),
    },
    ROLLOUTS: {"step": (int,)},
}
"""Fields that are read back, and their types. Rows of answers have no other fields."""

TYPE_NAMES = {
    str: "a text",
    list: "a list",
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
}


def read(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    """The rows of a .jsonl file of a run. Raises FolderError, which names file and line, for a row
    that a run does not write."""
    rows = []
    for number, row in folder.numbered(name, _remedy(name)):
        if fault := _fault(name, row):
            raise FolderError(
                f"'{folder.path / name}' is damaged at line {number}: {fault}; {_remedy(name)}"
            )
        rows.append(row)
    return rows


def before(folder: RunFolder) -> list[Answered]:
    """The answers before training; empty if they are not measured yet.

    Raises FolderError if some are missing: a second measurement would be of the trained model.
    """
    rows = [row for row in read(folder, ANSWERS) if row["when"] == "before"]
    measured = next((row["rows"] for row in read(folder, ACCURACY) if row["step"] == 0), len(rows))
    if measured != len(rows):
        raise FolderError(
            f"'{folder.path / ANSWERS}' is damaged: it holds {len(rows)} answers of before"
            f" training, and {ACCURACY} was made of {measured}; {_remedy(ANSWERS)}"
        )
    return [Answered(**{key: value for key, value in row.items() if key != "when"}) for row in rows]


def check(folder: RunFolder) -> None:
    """Raises FolderError if a file that a resumed run reads is damaged."""
    before(folder)
    for name in FIELDS:
        read(folder, name)


def _fault(name: str, row: Mapping[str, Any]) -> str:
    """The fault of a row, for a message; empty if the row is valid."""
    fields = FIELDS[name]
    for field, types in fields.items():
        if field not in row:
            return f"field '{field}' is missing"
        if type(row[field]) not in types:
            expected = " or ".join(TYPE_NAMES[kind] for kind in types)
            return f"field '{field}' is {shown(row[field])}, not {expected}"
    if name != ANSWERS:
        return ""
    if unknown := row.keys() - fields.keys():
        return f"field {shown(min(unknown))} is not known"
    if row["when"] not in ("before", "after"):
        return f'field \'when\' is {shown(row["when"])}, neither "before" nor "after"'
    answer = row["answer"]
    if isinstance(answer, list) and not all(isinstance(text, str) for text in answer):
        return f"field 'answer' is {shown(answer)}, not a list of texts"
    if row["crop"] is None and row["crop_right"] is not None:
        return "'crop_right' is not null, but 'crop' is"
    rights = ("full_right",) if row["crop"] is None else ("full_right", "crop_right")
    if any((row[field] is None) != (row["answer"] is None) for field in rights):
        return "'full_right' and 'crop_right' are null where 'answer' is, and only there"
    return ""


def _remedy(name: str) -> str:
    """The end of a message: what to do about a damaged file."""
    if name in (ANSWERS, ACCURACY):
        return (
            "restore the file, or begin the run anew: what was measured before training cannot be"
            " measured again"
        )
    return "remove that line to go on"
