"""The recipe that a model was trained with, for what is done with the model next.

A run's model is measured, shown and planned as the run did it, and trained on as the run trained
it: other images, another dtype or other parameters that train would give numbers that compare with
nothing. An option of the command line, and what a recipe that is named says, come first.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd import registry as backends
from opd.errors import DataError, plural
from opd.models.choice import is_tiny
from opd.models.find import CONFIG, checkpoint_of
from opd.paths import expanded
from opd.run import inputs
from opd.run import recipe as recipes
from opd.run.folder import RunFolder
from opd.run.recipe import PRESETS, Overrides, Recipe

Sections = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: a run or an export in words, the recipe's values, and the backend,
    where it is known."""

    name: str
    values: Sections
    backend: str | None = None
    stale: str = ""
    """What is told of a result that is not of the run's last step."""


@dataclass(frozen=True)
class Resolved:
    """A recipe; the line that says what nobody named; and the backend that the numbers of a model's
    run are of, where it has one."""

    recipe: Recipe
    line: str = ""
    backend: str = "auto"


def resolve(
    source: str | None,
    overrides: Overrides = (),
    training: bool = False,
    backend: str | None = None,
    with_data: bool = True,
) -> Resolved:
    """The recipe of a preset or file `source`, or of none, with overrides.

    What neither says is the model's run's, where it has one, else a preset's. `training`: all of
    the run's but data and seed; else its measured data too, which must be there if they are used
    (`with_data`). `backend` is the one that is asked for; where none is, the run's own measures
    again. Raises UserError.
    """
    if source in PRESETS:
        return Resolved(recipes.load(source, overrides), backend=backend or "auto")
    given = recipes.given(source, overrides)
    model = given.get("model")
    path = str(model.get("path", "tiny")) if isinstance(model, dict) else "tiny"
    found = None if "preset" in given else origin(path)
    if found is None:
        preset = recipes.preset(path)
        line = "" if source else f"preset {preset}: no recipe was named"
        return Resolved(recipes.load(source or preset, overrides), line, backend or "auto")
    own_data = found.values["data"].get("path", "tiny") != "tiny"
    if training and own_data and not _says(given, "data", "path") and is_tiny(path):
        # scenes of the embedded model are not what its run was trained on
        raise recipes.no_data(path)
    recipe = recipes.validate(
        recipes.over(_taken(found, given, training), given), source or found.name
    )
    if with_data:
        _check_data(recipe, given, found)
    own = found.backend if not training and backend is None and _runs_here(found.backend) else None
    return Resolved(recipe, _line(found, recipe, training, own), backend or own or "auto")


def origin(model: str) -> Origin | None:
    """Where a model comes from: of a run's folder, what the run left or one of its checkpoints, and
    of an export. None where nothing says.

    Raises UserError where the run's config.toml is damaged.
    """
    if model == "tiny":
        return None
    try:
        path = Path(expanded(model))
    except ValueError:  # told where the model is opened
        return None
    run, stale = path, ""
    checkpoint = checkpoint_of(path)
    if checkpoint:
        run = checkpoint[0]
    elif path.name in ("model", "adapter") and os.path.isfile(path.parent / CONFIG):
        run = path.parent
    if os.path.isfile(run / CONFIG) and not os.path.isfile(run / "config.json"):
        inputs.recorded(RunFolder(run))  # damage is told
        recipe, made_with = (
            recipes.reread(run / CONFIG),
            recipes.read(str(run / CONFIG)).get("made_with", {}),
        )
        step = (
            checkpoint[1]
            if checkpoint
            else recipes.step_of(run / recipe.model.result, recipe.run.steps)
        )
        if step != recipe.run.steps:
            stale = f"; its step {step} of {recipe.run.steps}"
        backend = made_with.get("backend") if isinstance(made_with, dict) else None
        return Origin(
            f"run '{run}'", recipe.model_dump(mode="json"), str(backend) if backend else None, stale
        )
    if os.path.isfile(path / recipes.BESIDE):
        values = recipes.read(str(path / recipes.BESIDE))
        values.pop("made_with", None)
        recipe = recipes.validate(values, str(path / recipes.BESIDE))
        return Origin(f"'{path}'", recipes.without_paths(recipe))
    return None


def _taken(found: Origin, given: Mapping[str, Any], training: bool) -> Sections:
    """What of a model's recipe serves what is done next."""
    values = {name: dict(section) for name, section in found.values.items()}
    for key in ("path", "revision"):
        values["model"].pop(key, None)
    if training:
        values["data"].pop("path", None)
        values["run"].pop("seed")
    elif _says(given, "data", "path") and not _says(given, "measure", "path"):
        values["measure"].pop("path", None)  # what is named is what is measured
    if _says(given, "model", "tune") and given["model"]["tune"] != values["model"]["tune"]:
        for key in ("vision", "projector"):  # they follow what is trained
            values["model"].pop(key)
    return values


def _check_data(recipe: Recipe, given: Mapping[str, Any], found: Origin) -> None:
    """Raises DataError where the run's data are no longer where they were."""
    for section, path, option in (
        ("data", recipe.data.path, "--data FILE"),
        ("measure", recipe.measure.path, "--set measure.path=FILE"),
    ):
        if (
            path not in ("", "tiny")
            and not _says(given, section, "path")
            and not os.path.exists(path)
        ):
            raise DataError(f"data file not found: {path}, of {found.name}; give {option}")


def _runs_here(backend: str | None) -> bool:
    return backend in backends.names() and backends.state(backend).ready


def _line(found: Origin, recipe: Recipe, training: bool, backend: str | None) -> str:
    """One line that says what is taken over."""
    model, optimizer, measure = recipe.model, recipe.optimizer, recipe.measure
    parts = [f"tune {model.tune}", f"dtype {model.dtype}"]
    if training:
        parts += [f"learning rate {optimizer.learning_rate:g}", plural(recipe.run.steps, "step")]
    pixels = [f"{name} {value}" for name, value in model.pixels().items() if value]
    parts += [f"view {recipe.view.kind}", *pixels]
    if not training:
        measured = measure.path or recipe.data.path
        parts += [
            f"{plural(measure.count, 'row')} of"
            f" {'its fresh scenes' if measured == 'tiny' else measured}"
        ]
        parts += [f"backend {backend}"] if backend else []
    what = "the recipe, but data and seed," if training else "the recipe"
    return f"{what} of {found.name}{found.stale}: {', '.join(parts)}"


def _says(given: Mapping[str, Any], section: str, key: str) -> bool:
    values = given.get(section)
    return isinstance(values, Mapping) and key in values
