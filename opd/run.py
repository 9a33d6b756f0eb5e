"""From a recipe to a trainer: opens data and model before anything is written, then makes the run folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import opd
from opd import backend as backends
from opd import hub, measure, usable
from opd import recipe as recipes
from opd.backend import Backend
from opd.data import Dataset, open_data, spread
from opd.errors import DataError, RecipeError
from opd.folder import CONFIG, RunFolder
from opd.loop import Trainer
from opd.models import is_tiny
from opd.processor import open_encoder
from opd.progress import Progress, Quiet
from opd.recipe import Recipe
from opd.types import Encoder, Example
from opd.usable import Skipped

PACKAGES = ("torch", "transformers", "mlx", "mlx-vlm", "numpy", "pillow")
"""Packages whose versions are written down with a run."""


@dataclass(frozen=True)
class Session:
    """A recipe's model and data, opened on a backend."""

    recipe: Recipe
    name: str
    backend: Backend
    encoder: Encoder
    examples: Sequence[Example]
    held_out: Sequence[Example]

    def answer(self, progress: Progress) -> tuple[list[measure.Answered], Skipped]:
        """Greedy answers to the held-out examples, on the full image and on the crop; and the examples that cannot be used.

        Raises DataError where not one of the examples can be.
        """
        progress.begin("measure", 2 * len(self.held_out))
        options, skipped = self.recipe.measure, Skipped(progress)
        answered = measure.answer(
            self.backend,
            self.encoder,
            self.held_out,
            self.recipe.view,
            options.max_tokens,
            self.recipe.rollout.sample_tokens,
            progress.advance,
            self.recipe.data.max_prompt_tokens,
            skipped,
        )
        if self.held_out and not answered:
            raise DataError(f"none of {usable.rows(len(self.held_out))} can be measured ({skipped.why()})")
        if missing := len(self.held_out) - len(answered):
            share = f"{missing} of {usable.rows(len(self.held_out))} ({missing / len(self.held_out):.1%})"
            progress.note(f"{share} cannot be used: {skipped.why()}")
        return answered, skipped


def open_session(recipe: Recipe, backend: str, progress: Progress, few: bool = False) -> Session:
    """Opens the model's small files, then data, then weights, so that a mistake is told before anything slow. Raises UserError.

    With `few`, only the rows that are measured are read, and `examples` are those.
    """
    if backend != "auto":  # which one `auto` is takes seconds: frameworks are imported to see their devices
        backends.resolve(backend)
    for path in (recipe.data.path, recipe.measure.path):
        if path not in ("", "tiny") and not os.path.exists(path):
            raise DataError(f"data file not found: {path}")
    with progress.pause():  # a download shows its own bars
        folder = recipe.model.folder(weights=False)
    recipe = _pinned(recipe, folder)
    name = backends.resolve(backend)
    encoder = open_encoder(folder, name, **recipe.model.pixels())
    _check_data_is_given(recipe)
    examples = None if few else _open_rows(recipe, recipe.data.path, progress)
    measured = held_out(recipe, examples, progress)
    with progress.pause():
        options = recipe.model.options(recipe.run.seed)
    model = backends.load(name, options)
    if recipe.model.path == "tiny" != recipe.data.path:
        progress.note("the embedded tiny model knows nothing but its own scenes; a model for your images is named with --model")
    return Session(recipe, name, model, encoder, measured if examples is None else examples, measured)


def start(recipe: Recipe, backend: str, out: Path, force: bool = False, progress: Progress | None = None) -> Trainer:
    """A trainer in a new run folder `out`. Raises UserError before anything is written where the input is wrong."""
    RunFolder.check(out, force)
    session = open_session(recipe, backend, progress or Quiet())
    if session.backend.rank == 0:
        data = {"rows": len(session.examples), "fingerprint": getattr(session.examples, "fingerprint", "generated")}
        made_with = {
            "backend": session.name,
            "opd": opd.__version__,
            "python": platform.python_version(),
            "packages": _versions(),
            "data": data,
        }
        folder = RunFolder.create(out, recipes.write(_anywhere(session.recipe), made_with), force)
        _tell_unlocked(folder, progress or Quiet())
    else:
        folder = RunFolder(out)
    return _trainer(session, folder, progress)


def resume(path: Path, backend: str | None = None, progress: Progress | None = None) -> Trainer:
    """A trainer that goes on with the run in `path`, on its own backend or another one."""
    folder = RunFolder.open(path).locked()
    try:
        _tell_unlocked(folder, progress or Quiet())
        values = recipes.read(str(path / CONFIG))
        made_with = values.get("made_with", {})
        session = open_session(recipes.reread(path / CONFIG), backend or made_with.get("backend", "auto"), progress or Quiet())
        began_with = made_with.get("data", {}).get("fingerprint")
        if began_with not in (None, getattr(session.examples, "fingerprint", "generated")):
            data = session.recipe.data.path
            raise DataError(f"{data} is not what this run began with; restore it, or start a new run from this one's model with --model")
    except BaseException:
        folder.release()
        raise
    return _trainer(session, folder, progress)


def held_out(recipe: Recipe, examples: Sequence[Example] | None, progress: Progress | None = None) -> Sequence[Example]:
    """The rows that are measured, at most measure.count: see `MeasureOptions.path`.

    `examples` are all rows of data.path; where they are None, only the rows that are measured are read.
    """
    options = recipe.measure
    if not options.count:
        return []
    if (options.path or recipe.data.path) == "tiny":
        from opd.tiny import Scenes

        return Scenes("fresh", options.count)
    if examples is None or options.path:
        return _open_rows(recipe, options.path or recipe.data.path, progress or Quiet(), options.count)
    return spread(examples, options.count)


def _open_rows(recipe: Recipe, path: str, progress: Progress, count: int | None = None) -> Sequence[Example]:
    """All rows of a data file, or so many spread over it; what is wrong with the others is told."""
    options = recipe.data
    examples = open_data(path, options.strict, progress=progress, max_image_pixels=options.max_image_pixels, count=count)
    if isinstance(examples, Dataset):
        examples.tell(progress)
    return examples


def _tell_unlocked(folder: RunFolder, progress: Progress) -> None:
    if folder.lock and not folder.lock.works:
        progress.note(f"the file system of '{folder.path}' has no locks: nothing keeps a second process from training there")


def _check_data_is_given(recipe: Recipe) -> None:
    """Raises RecipeError where nobody named the data, and the model is not the one that the default data are for."""
    if "path" in recipe.data.model_fields_set or is_tiny(recipe.model.path):
        return
    raise RecipeError(
        f"model '{recipe.model.path}' has no data yet: give --data FILE (--data tiny takes the scenes of the embedded model, for a try)"
    )


def _pinned(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the commit of a Hugging Face id: a run that is resumed must find the model that it began with."""
    commit = hub.commit(folder) if hub.is_id(recipe.model.path) and not Path(recipe.model.path).is_dir() else ""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})}) if commit else recipe


def _trainer(session: Session, folder: RunFolder, progress: Progress | None) -> Trainer:
    return Trainer(
        session.recipe,
        session.backend,
        session.encoder,
        session.examples,
        session.held_out,
        folder,
        session.name,
        progress or Quiet(),
    )


def _anywhere(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths: a run is resumed from any folder."""

    def section(name: str) -> Any:
        options = getattr(recipe, name)
        path = Path(options.path)
        there = options.path not in ("", "tiny") and path.exists()
        return options.model_copy(update={"path": str(path.resolve())}) if there else options

    return recipe.model_copy(update={name: section(name) for name in ("model", "data", "measure")})


def _versions() -> dict[str, Any]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
