"""What a run has written about itself, read back and checked: people open these files, and cut or
edit them.

A run that goes on from a wrong record would compare with answers that nobody gave.
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
        "crop": (str,),
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
"""Types of the fields that are read again; only a row of answers has no others."""

WORDS = {
    str: "a text",
    list: "a list",
    type(None): "null",
    bool: "true or false",
    int: "a whole number",
}


def read(folder: RunFolder, name: str) -> list[dict[str, Any]]:
    """The rows of a run's .jsonl file. Raises FolderError, which names file and line, where one is
    not what a run writes."""
    rows = []
    for number, row in folder.numbered(name, _remedy(name)):
        if fault := _fault(name, row):
            raise FolderError(
                f"'{folder.path / name}' is damaged at line {number}: {fault}; {_remedy(name)}"
            )
        rows.append(row)
    return rows


def before(folder: RunFolder) -> list[Answered]:
    """The answers before training; none where nobody has measured yet.

    Raises FolderError where some are gone: measured again, the trained model's would take their
    place.
    """
    rows = [row for row in read(folder, ANSWERS) if row["when"] == "before"]
    measured = next((row["rows"] for row in read(folder, ACCURACY) if row["step"] == 0), len(rows))
    if measured != len(rows):
        held = (
            f"it holds {len(rows)} answers of before training, and {ACCURACY} was made of"
            f" {measured}"
        )
        raise FolderError(f"'{folder.path / ANSWERS}' is damaged: {held}; {_remedy(ANSWERS)}")
    return [Answered(**{key: value for key, value in row.items() if key != "when"}) for row in rows]


def check(folder: RunFolder) -> None:
    """Raises FolderError where a record that a run goes on from is damaged."""
    before(folder)
    for name in FIELDS:
        read(folder, name)


def _fault(name: str, row: Mapping[str, Any]) -> str:
    """What is wrong with a row; empty where nothing is."""
    fields = FIELDS[name]
    for field, types in fields.items():
        if field not in row:
            return f"field '{field}' is missing"
        if type(row[field]) not in types:
            return (
                f"field '{field}' is {shown(row[field])}, not"
                f" {' or '.join(WORDS[one] for one in types)}"
            )
    if name != ANSWERS:
        return ""
    if unknown := row.keys() - fields.keys():
        return f"field {shown(min(unknown))} is not known"
    if row["when"] not in ("before", "after"):
        return f'field \'when\' is {shown(row["when"])}, neither "before" nor "after"'
    if isinstance(row["answer"], list) and not all(isinstance(one, str) for one in row["answer"]):
        return f"field 'answer' is {shown(row['answer'])}, not a list of texts"
    if any(
        (row[field] is None) != (row["answer"] is None) for field in ("full_right", "crop_right")
    ):
        return "'full_right' and 'crop_right' are null where 'answer' is, and only there"
    return ""


def _remedy(name: str) -> str:
    if name in (ANSWERS, ACCURACY):
        return (
            "restore the file, or begin the run anew: what was measured before training cannot be"
            " measured again"
        )
    return "remove that line to go on"
