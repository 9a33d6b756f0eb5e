"""From a recipe to a trainer: opens data and model before anything is written, then makes the run folder."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import opd
from opd import backend as backends
from opd import recipe as recipes
from opd.data import open_data
from opd.folder import CONFIG, RunFolder
from opd.loop import Progress, Quiet, Trainer
from opd.prompts import PromptEncoder
from opd.recipe import Recipe
from opd.types import Example

PACKAGES = ("torch", "transformers", "mlx", "mlx-vlm", "numpy", "pillow")
"""Packages whose versions are written down with a run."""


def start(recipe: Recipe, backend: str, out: Path, force: bool = False, progress: Progress | None = None) -> Trainer:
    """A trainer in a new run folder `out`. Raises UserError before anything is written where the input is wrong."""
    trainer = _prepare(recipe, backend, RunFolder(out), progress)
    if trainer.backend.rank == 0:
        made_with = {"backend": trainer.name, "opd": opd.__version__, "python": platform.python_version(), "packages": _versions()}
        made_with["data"] = {"rows": len(trainer.examples), "fingerprint": getattr(trainer.examples, "fingerprint", "generated")}
        RunFolder.create(out, recipes.write(recipe, made_with), force)
    return trainer


def resume(path: Path, backend: str | None = None, progress: Progress | None = None) -> Trainer:
    """A trainer that goes on with the run in `path`, on its own backend or another one."""
    folder = RunFolder.open(path)
    values = recipes.read(str(path / CONFIG))
    recipe = recipes.reread(path / CONFIG)
    return _prepare(recipe, backend or values.get("made_with", {}).get("backend", "auto"), folder, progress)


def held_out(recipe: Recipe, examples: Sequence[Example]) -> Sequence[Example]:
    """The rows that are measured, at most measure.count: see `MeasureOptions.path`."""
    options = recipe.measure
    if not options.count:
        return []
    if (options.path or recipe.data.path) == "tiny":
        from opd.tiny import Scenes

        return Scenes("measure", options.count)
    rows = open_data(options.path, strict=recipe.data.strict) if options.path else examples
    count = min(options.count, len(rows))
    return [rows[index * len(rows) // count] for index in range(count)]


def _prepare(recipe: Recipe, backend: str, folder: RunFolder, progress: Progress | None) -> Trainer:
    progress = progress or Quiet()
    name = backends.automatic() if backend == "auto" else backend
    examples = open_data(recipe.data.path, strict=recipe.data.strict)
    for source, reason in getattr(examples, "skipped", ()):
        progress.note(f"skipped {source}: {reason}")
    encoder = PromptEncoder(recipe.model.folder(), recipe.model.max_pixels or None)
    return Trainer(
        recipe, backends.load(name, recipe.model.options()), encoder, examples, held_out(recipe, examples), folder, name, progress
    )


def _versions() -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
