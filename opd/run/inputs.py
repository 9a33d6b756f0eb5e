"""What a run began with, in its folder's inputs.json: a run that is resumed must find the same.

`recipe` holds every key without the paths, which may move; `model` a fingerprint of each file;
`data` and `measured` the fingerprints of the data that are trained on and measured (null where
those are the same); `history` what people have changed on purpose since.
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
"""Changes of one kind that a message names."""


def of_data(examples: Sequence[Any]) -> dict[str, Any]:
    """Fingerprint and number of the usable rows of opened data."""
    return {"fingerprint": getattr(examples, "fingerprint", "generated"), "rows": len(examples)}


def began(folder: RunFolder) -> Inputs:
    """What the run began with; of a run of an earlier version only what its config.toml says of its
    data.

    Raises FolderError where config.toml or inputs.json is damaged.
    """
    found = recorded(folder)
    if found is not None:
        return found
    config = read(str(folder.path / CONFIG))
    if not config.keys() & Recipe.model_fields.keys():
        raise FolderError(
            f"'{folder.path / CONFIG}' is damaged: it holds no section of a recipe; restore the"
            " file"
        )
    made_with = config.get("made_with")
    return {"data": made_with.get("data")} if isinstance(made_with, dict) else {}


def recorded(folder: RunFolder) -> Inputs | None:
    """What inputs.json says; None where a run of an earlier version has none.

    Raises FolderError where inputs.json is damaged, and where config.toml has lost something that
    stands in it.
    """
    try:
        found = folder.read(FILE)
        sections = {str(name): set(section) for name, section in found["recipe"].items()}
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
    return found


def changes(
    before: Inputs, now: Inputs, recipe: Recipe, folder: RunFolder, passed: Collection[str] = ()
) -> list[str]:
    """What is not as it was, each with how; what `before` does not tell is passed over, and keys of
    the recipe that are `passed`."""
    found = []
    if before.get("recipe"):
        found += _named(
            str(folder.path / CONFIG), _of_recipe(before["recipe"], now["recipe"], passed)
        )
    if before.get("model"):
        found += _named(recipe.model.path, _of_files(before["model"], now["model"]))
    if before.get("data"):
        found += _named(recipe.data.path, _of_rows(before["data"], now["data"]))
    if "measured" in before and recipe.measure.count:
        measured = recipe.measure.path or recipe.data.path
        found += _named(
            measured, _of_rows(before["measured"] or before["data"], now["measured"] or now["data"])
        )
    return list(dict.fromkeys(found))


def _named(where: str, how: Sequence[str]) -> list[str]:
    more = f", and {len(how) - LISTED} more" if len(how) > LISTED else ""
    return (
        [f"{where} is not what this run began with ({', '.join(how[:LISTED])}{more})"]
        if how
        else []
    )


def _of_recipe(
    before: Mapping[str, Any], now: Mapping[str, Any], passed: Collection[str]
) -> list[str]:
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
    changed = [
        f"{name} has changed" for name, value in before.items() if now.get(name, value) != value
    ]
    gone = [f"{name} is gone" for name in before if name not in now]
    return [*changed, *gone, *(f"{name} is new" for name in now if name not in before)]


def _of_rows(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if before.get("fingerprint") in (None, now["fingerprint"]):
        return []
    rows = before.get("rows")
    return [
        (
            f"{now['rows']} usable rows, were {rows}"
            if rows not in (None, now["rows"])
            else "a line or an image has changed"
        )
    ]


def _shown(value: Any) -> str:
    return shortened(repr(value), 40)
