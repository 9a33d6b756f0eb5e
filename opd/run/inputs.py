"""The inputs that a run began with, in inputs.json of the run folder: a resumed run must find the
same.

`recipe` holds every key except paths, which may move; `model`: a fingerprint of each file; `data`:
fingerprint and rows of the training data; `measured`: the same of the measured data, null if they
are the training data; `history`: the changes that people have made on purpose since.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

from opd.errors import FolderError, shortened
from opd.models.find import CONFIG
from opd.run.folder import RunFolder
from opd.run.recipe import Recipe, read

FILE = "inputs.json"

Inputs: TypeAlias = Mapping[str, Any]

LISTED = 4
"""Number of changes of one input that a message lists."""


def of_data(examples: Sequence[Any]) -> dict[str, Any]:
    """Fingerprint and number of usable rows of opened data."""
    return {"fingerprint": getattr(examples, "fingerprint", "generated"), "rows": len(examples)}


def began(folder: RunFolder) -> Inputs:
    """The inputs that the run began with; for a run of an earlier version only those that its
    config.toml records.

    Raises FolderError if config.toml or inputs.json is damaged.
    """
    inputs = recorded(folder)
    if inputs is not None:
        return inputs
    config = read(str(folder.path / CONFIG))
    if not config.keys() & Recipe.model_fields.keys():
        raise FolderError(
            f"'{folder.path / CONFIG}' is damaged: it holds no section of a recipe; restore the"
            " file"
        )
    made_with = config.get("made_with")
    return {"data": made_with.get("data")} if isinstance(made_with, dict) else {}


def recorded(folder: RunFolder) -> Inputs | None:
    """The content of inputs.json; None for a run of an earlier version, which has no such file.

    Raises FolderError if inputs.json is damaged, or if config.toml lacks a key that inputs.json
    has.
    """
    try:
        inputs = folder.read(FILE)
        sections = {str(name): set(section) for name, section in inputs["recipe"].items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FolderError(
            f"'{folder.path / FILE}' is damaged: {error}; remove the file to go on without what it"
            " holds"
        ) from error
    config = read(str(folder.path / CONFIG))
    for name, keys in sections.items():
        section = config.get(name)
        missing = sorted(keys - set(section)) if isinstance(section, dict) else [""]
        if missing:
            where = f"{name}.{missing[0]}" if missing[0] else f"section [{name}]"
            raise FolderError(
                f"'{folder.path / CONFIG}' is damaged: {where} is missing; {FILE} beside it has"
                " what was there: restore it"
            )
    return inputs


def changes(
    before: Inputs, now: Inputs, recipe: Recipe, folder: RunFolder, passed: Collection[str] = ()
) -> list[str]:
    """One line for each input that differs between `before` and `now`.

    Inputs that `before` does not record are not compared, nor are the keys of the recipe in
    `passed`, such as "run.steps".
    """
    lines = []
    if before.get("recipe"):
        differences = _of_recipe(before["recipe"], now["recipe"], passed)
        lines += _line(str(folder.path / CONFIG), differences)
    if before.get("model"):
        lines += _line(recipe.model.path, _of_files(before["model"], now["model"]))
    if before.get("data"):
        lines += _line(recipe.data.path, _of_rows(before["data"], now["data"]))
    if "measured" in before and recipe.measure.count:
        measured = recipe.measure.path or recipe.data.path
        rows_before, rows_now = (side["measured"] or side["data"] for side in (before, now))
        lines += _line(measured, _of_rows(rows_before, rows_now))
    return list(dict.fromkeys(lines))


def _line(name: str, differences: Sequence[str]) -> list[str]:
    """The line about an input that differs; no line if there are no differences."""
    if not differences:
        return []
    more = f", and {len(differences) - LISTED} more" if len(differences) > LISTED else ""
    listed = ", ".join(differences[:LISTED])
    return [f"{name} is not what this run began with ({listed}{more})"]


def _of_recipe(
    before: Mapping[str, Any], now: Mapping[str, Any], passed: Collection[str]
) -> list[str]:
    """The keys of a recipe whose values differ, in words."""
    return [
        f"{name}.{key} = {_shown(now[name][key])}, was {_shown(value)}"
        for name, section in before.items()
        for key, value in section.items()
        if name in now
        and key in now[name]
        and now[name][key] != value
        and f"{name}.{key}" not in passed
    ]


def _of_files(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """The files whose fingerprints differ, in words."""
    changed = [
        f"{name} has changed" for name, value in before.items() if now.get(name, value) != value
    ]
    gone = [f"{name} is gone" for name in before if name not in now]
    return [*changed, *gone, *(f"{name} is new" for name in now if name not in before)]


def _of_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The difference between two data sets of `of_data`, in words; empty if they are equal."""
    if before.get("fingerprint") in (None, now["fingerprint"]):
        return []
    rows = before.get("rows")
    if rows not in (None, now["rows"]):
        return [f"{now['rows']} usable rows, were {rows}"]
    return ["a line or an image has changed"]


def _shown(value: Any) -> str:
    return shortened(repr(value), 40)
