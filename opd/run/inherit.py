"""Resolves the recipe for a model that a run has trained.

Such a model is measured, shown, planned and trained further with the recipe of its run, since
another image size, dtype or choice of trained parameters would give numbers that cannot be
compared. Options on the command line, and keys of a named recipe, take precedence.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd import registry
from opd.data import may_exist
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
    """The run or export that a model comes from: `name` in words, the `values` of the recipe, and
    the `backend`, None if it is unknown."""

    name: str
    values: Sections
    backend: str | None = None
    stale: str = ""
    """For a message about a result that is not of the run's last step; else empty."""


@dataclass(frozen=True)
class Resolved:
    """A recipe, a `line` that says which options were not named but inherited, and the `backend` to
    use."""

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
    """The recipe of a preset or file `source`, with overrides; both may be absent.

    Keys that neither gives come from the run or export that the model comes from, else from a
    preset. For `training`, data and seed are not inherited; otherwise the measured data are, and
    must exist if `with_data`. `backend`: the one that was asked for; None: that of the model's run,
    if it can run here and nothing is trained, else "auto". Raises UserError.
    """
    if source in PRESETS:
        return Resolved(recipes.load(source, overrides), backend=backend or "auto")
    given = recipes.given(source, overrides)
    model = given.get("model")
    path = str(model.get("path", "tiny")) if isinstance(model, dict) else "tiny"
    source_run = None if "preset" in given else origin(path)
    if source_run is None:
        preset = recipes.preset(path)
        line = "" if source else f"preset {preset}: no recipe was named"
        return Resolved(recipes.load(source or preset, overrides), line, backend or "auto")
    on_data = source_run.values["data"].get("path", "tiny") != "tiny"
    if training and on_data and not _gives(given, "data", "path") and is_tiny(path):
        # The run was not trained on the scenes of the embedded model.
        raise recipes.no_data(path)
    values = recipes.merged(_inherited(source_run, given, training), given)
    recipe = recipes.validate(values, source or source_run.name)
    if with_data:
        _check_data(recipe, given, source_run)
    run_backend = None
    if not training and backend is None and _runs_here(source_run.backend):
        run_backend = source_run.backend
    line = _line(source_run, recipe, training, run_backend)
    return Resolved(recipe, line, backend or run_backend or "auto")


def origin(model: str) -> Origin | None:
    """The origin of a model: `model` may be a run folder, a result or checkpoint in it, or an
    export. None if the folder does not say where the model comes from.

    Raises UserError if the run's config.toml is damaged.
    """
    if model == "tiny":
        return None
    try:
        path = Path(expanded(model))
    except ValueError:  # opening the model raises the error
        return None
    run, stale = path, ""
    checkpoint = checkpoint_of(path)
    if checkpoint:
        run = checkpoint[0]
    elif path.name in ("model", "adapter") and os.path.isfile(path.parent / CONFIG):
        run = path.parent
    if os.path.isfile(run / CONFIG) and not os.path.isfile(run / "config.json"):
        inputs.recorded(RunFolder(run))  # raises FolderError if the folder is damaged
        recipe = recipes.reread(run / CONFIG)
        made_with = recipes.read(str(run / CONFIG)).get("made_with", {})
        if checkpoint:
            step = checkpoint[1]
        else:
            step = recipes.step_of(run / recipe.model.result, recipe.run.steps)
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


def _inherited(source_run: Origin, given: Mapping[str, Any], training: bool) -> Sections:
    """The values of a model's recipe that the new recipe inherits."""
    values = {name: dict(section) for name, section in source_run.values.items()}
    for key in ("path", "revision"):
        values["model"].pop(key, None)
    if training:
        values["data"].pop("path", None)
        values["run"].pop("seed")
    elif _gives(given, "data", "path") and not _gives(given, "measure", "path"):
        values["measure"].pop("path", None)  # the named data are measured
    if _gives(given, "model", "tune") and given["model"]["tune"] != values["model"]["tune"]:
        for key in ("vision", "projector"):  # their defaults depend on `tune`
            values["model"].pop(key)
    return values


def _check_data(recipe: Recipe, given: Mapping[str, Any], source_run: Origin) -> None:
    """Raises DataError if inherited data files do not exist."""
    for section, path, option in (
        ("data", recipe.data.path, "--data FILE"),
        ("measure", recipe.measure.path, "--set measure.path=FILE"),
    ):
        if path not in ("", "tiny") and not _gives(given, section, "path") and not may_exist(path):
            raise DataError(f"data file not found: {path}, of {source_run.name}; give {option}")


def _runs_here(backend: str | None) -> bool:
    return backend in registry.names() and registry.state(backend).ready


def _line(source_run: Origin, recipe: Recipe, training: bool, backend: str | None) -> str:
    """A line that names the inherited options."""
    model, optimizer, measure = recipe.model, recipe.optimizer, recipe.measure
    parts = [f"tune {model.tune}", f"dtype {model.dtype}"]
    if training:
        parts += [f"learning rate {optimizer.learning_rate:g}", plural(recipe.run.steps, "step")]
    pixels = [f"{name} {value}" for name, value in model.pixels().items() if value]
    parts += [f"view {recipe.view.title}", *pixels]
    if not training:
        path = measure.path or recipe.data.path
        data = "its fresh scenes" if path == "tiny" else path
        parts.append(f"{plural(measure.count, 'row')} of {data}")
        parts += [f"backend {backend}"] if backend else []
    what = "the recipe, but data and seed," if training else "the recipe"
    return f"{what} of {source_run.name}{source_run.stale}: {', '.join(parts)}"


def _gives(given: Mapping[str, Any], section: str, key: str) -> bool:
    """Whether the `given` values hold a key."""
    values = given.get(section)
    return isinstance(values, Mapping) and key in values
