"""A recipe: every option of a run, from a preset or a TOML file, with overrides.

Each section is declared, with defaults, ranges and help, in the module that uses it; this module
combines the sections.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

import tomli_w
from pydantic import Field, ValidationError

from opd.data import DataOptions
from opd.errors import RecipeError, nearest
from opd.measure.gap import MeasureOptions
from opd.method.rollout import RolloutOptions
from opd.method.schedules import OptimizerOptions, TeacherOptions
from opd.models.choice import ModelChoice, is_tiny
from opd.objective import ObjectiveOptions
from opd.options import Options
from opd.paths import expanded, read_file
from opd.views.view import ViewOptions

PRESETS = ("tiny", "paper", "lora")


class RunOptions(Options):
    """The length of the run, and what the run saves."""

    steps: int = Field(65, ge=1, description="Optimizer steps.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of data order and sampling.")
    checkpoint_every: int = Field(
        50, ge=0, description="Steps between checkpoints; 0: only the last one."
    )
    keep: int = Field(2, ge=1, description="Checkpoints that are kept, newest first.")
    rollouts_every: int = Field(
        10, ge=0, description="Steps between the completions written to rollouts.jsonl; 0: none."
    )


class Recipe(Options):
    """All sections; `--set section.key=value` uses the same names."""

    model: ModelChoice = ModelChoice()
    data: DataOptions = DataOptions()
    view: ViewOptions = ViewOptions()
    rollout: RolloutOptions = RolloutOptions()
    objective: ObjectiveOptions = ObjectiveOptions()
    teacher: TeacherOptions = TeacherOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    measure: MeasureOptions = MeasureOptions()
    run: RunOptions = RunOptions()

    @property
    def seeded_view(self) -> ViewOptions:
        """The view with the run's seed, on which mixtures and degraded images depend."""
        return self.view.seeded(self.run.seed)


REFERENCE = """# A recipe

One TOML file; `--set section.key=value` takes the same names. A file says what differs from a
preset: the one it names with a first line `preset = "paper"`, else `tiny` for the embedded model
and `lora` for any other. The defaults below hold for what the preset does not set; the presets are
in [opd/presets](../opd/presets). Made by `python -m opd.run.recipe > docs/recipe.md`.
"""


BESIDE = "recipe.toml"
"""The file, beside the weights of a result, that holds the recipe of the training."""

PATHS = {"model": ("path", "revision"), "data": ("path", "images"), "measure": ("path",)}
"""Keys that only say where a file or folder is."""

Overrides: TypeAlias = Sequence[str] | Mapping[str, Mapping[str, Any]]
"""Changes of a recipe: texts `section.key=value`, or values by section and key."""

DATA = {".jsonl", ".json", ".parquet", ".csv", ".tsv"}
"""Suffixes of data files, which people may give in the place of a recipe."""


def load(source: str = "tiny", overrides: Overrides = ()) -> Recipe:
    """The recipe of a preset or a TOML file, with overrides. Raises RecipeError, of one line.

    A file holds differences from a preset: the one that it names at the top (`preset = "paper"`),
    else the usual one for its model (`preset`).
    """
    values = given(source, overrides)
    if source not in PRESETS:
        section = values.get("model")
        named = values.pop("preset", None) or preset(
            str(section.get("path", "tiny") if isinstance(section, dict) else "tiny")
        )
        if named not in PRESETS:
            raise RecipeError(
                f"recipe '{source}': unknown preset {named!r}; {nearest(str(named), PRESETS)}"
            )
        values = merged(read(named), values)
    return validate(values, source)


def given(source: str | None, overrides: Overrides = ()) -> dict[str, Any]:
    """The values that a person gives: those of a file or preset, and the overrides, not yet
    validated. Raises RecipeError."""
    values = read(source) if source else {}
    values.pop("made_with", None)  # a run's config.toml has this table
    if isinstance(overrides, Mapping):
        return merged(values, overrides)
    for override in overrides:
        assign(values, override)
    return values


def preset(model: str) -> str:
    """The preset of a recipe that names none: `tiny` for the embedded model and models trained from
    it, `lora` for any other."""
    return "tiny" if is_tiny(model) else "lora"


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `above`, by section and key, and those of `below` for all other keys."""
    shared = {name for name in below.keys() & above.keys() if isinstance(above[name], Mapping)}
    both = {
        name: {**below[name], **above[name]} for name in shared if isinstance(below[name], Mapping)
    }
    return {**below, **above, **both}


def read(source: str) -> dict[str, Any]:
    """The values of a preset or a TOML file, not yet validated. Raises RecipeError."""
    if source in PRESETS:
        text = (files("opd") / "presets" / f"{source}.toml").read_text(encoding="utf-8")
    else:
        try:
            path = Path(expanded(source))
        except ValueError as error:
            raise RecipeError(f"recipe: {error}") from error
        if (path / "config.toml").is_file():
            raise RecipeError(
                f"'{source}' is a run folder, no recipe; a model is given with --model {source}"
            )
        if not path.is_file():
            raise RecipeError(
                f"recipe '{source}': neither a file nor a preset; {nearest(source, PRESETS)}"
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe '{source}' cannot be read: {error}") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        if Path(source).suffix in DATA:
            raise RecipeError(
                f"'{source}' is no recipe (a TOML file); data is given with --data {source}"
            ) from error
        raise RecipeError(f"recipe '{source}' is not valid TOML: {error}") from error


def assign(values: dict[str, Any], override: str) -> None:
    """Puts one override `section.key=value` into `values`; a key that holds a table has names of
    its own, `data.columns.question=prompt`. The value is read as TOML, else a table as JSON; any
    other text is a string. Raises RecipeError."""
    name, equals, text = override.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise RecipeError(
            f"--set {override}: write it as section.key=value, such as --set run.steps=100"
        )
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    # Not TOML, a number of thousands of digits, or lists nested too deep.
    except (ValueError, RecursionError):
        value = _json_table(text)
    keys, where = values, ""
    *tables, last = (section, *key.split("."))
    for name in tables:
        where += f"{'.' if where else ''}{name}"
        keys = keys.setdefault(name, {})
        if not isinstance(keys, dict):
            kind = "section" if where == section else "table"
            raise RecipeError(f"--set {override}: {where} = {keys!r} in the recipe is no {kind}")
    keys[last] = value


def _json_table(text: str) -> Any:
    """The table that `text` holds as JSON, such as {"crop": 0.7}; else `text`."""
    try:
        value = json.loads(text) if text.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        value = None
    return value if isinstance(value, dict) else text


def validate(values: Mapping[str, Any], source: str) -> Recipe:
    """The recipe of plain values; `source` names them in messages. Raises RecipeError for the first
    unknown key or value out of range."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as failure:
        error = failure.errors()[0]
        place = [part for part in error["loc"] if part != "[key]"]  # a table's key, not its value
        where = ".".join(str(part) for part in place)
        if error["type"] == "extra_forbidden":
            *section, name = (str(part) for part in error["loc"])
            known = Recipe.model_fields
            if section:
                known = known[section[0]].default.__class__.model_fields
            raise RecipeError(
                f"recipe '{source}': unknown key {where}; {nearest(name, known)}"
            ) from failure
        # A section's validator has checked several keys together, and says what is wrong.
        if error["type"] == "value_error":
            raise RecipeError(f"recipe '{source}': {where}: {error['ctx']['error']}") from failure
        whole_section = len(place) == 1 and isinstance(error["input"], dict)
        given = "this section" if whole_section else error["input"]
        raise RecipeError(
            f"recipe '{source}': {where} = {given!r}: {_plain(error['msg'])}"
        ) from failure


def write(recipe: Recipe, made_with: Mapping[str, Any]) -> str:
    """The recipe as TOML, followed by a table [made_with], such as versions and the fingerprint of
    the data."""
    return tomli_w.dumps({**recipe.model_dump(mode="json"), "made_with": dict(made_with)})


def without_paths(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The sections of a recipe as plain values, without the keys in PATHS."""
    dumped = recipe.model_dump(mode="json")
    return {
        name: {key: value for key, value in section.items() if key not in PATHS.get(name, ())}
        for name, section in dumped.items()
    }


def no_data(model: str) -> RecipeError:
    """The RecipeError for a model other than the embedded one, whose recipe names no data."""
    return RecipeError(
        f"model '{model}' has no data yet: give --data FILE (--data tiny takes the scenes of the"
        " embedded model, for a try)"
    )


def write_beside(recipe: Recipe, folder: Path, step: int) -> None:
    """Writes the recipe, without paths, and the `step` of the weights into the `folder` of a
    result, so that it can be measured and trained with the same options elsewhere."""
    content = {**without_paths(recipe), "made_with": {"step": step}}
    (folder / BESIDE).write_text(tomli_w.dumps(content), encoding="utf-8")


def step_of(folder: Path, finished: int) -> int:
    """The step of the weights in `folder`, as `write_beside` wrote it; `finished` if it is not
    there, as in results of earlier versions."""
    try:
        return int(tomllib.loads(read_file(folder / BESIDE).decode("utf-8"))["made_with"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return finished


def reread(path: Path) -> Recipe:
    """The recipe in `path`, the config.toml of a run folder. Raises RecipeError."""
    values = read(str(path))
    values.pop("made_with", None)
    return validate(values, str(path))


def _plain(message: str) -> str:
    """The message without the capital letter at the beginning."""
    return message[:1].lower() + message[1:]


def reference() -> str:
    """The content of docs/recipe.md: every section and key, with default and help, as Markdown."""
    lines = [REFERENCE]
    for name, section in Recipe.model_fields.items():
        options = type(section.default)
        lines += [
            f"## [{name}]",
            "",
            (options.__doc__ or "").strip().splitlines()[0],
            "",
            "| key | default | |",
            "|---|---|---|",
        ]
        for key, value in section.default.model_dump(mode="json").items():
            description = options.model_fields[key].description or ""
            default = (
                json.dumps(value)
                if isinstance(value, list | dict)
                else tomli_w.dumps({key: value}).partition(" = ")[2].strip()
            )
            lines.append(f"| `{key}` | `{default}` | {description} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference(), end="")
