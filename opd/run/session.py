"""From a recipe to a trainer: opens data and model before anything is written, then makes the run
folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opd import registry as backends
from opd.backend import Backend
from opd.data import Dataset, open_data, spread
from opd.errors import DataError, FolderError, plural
from opd.measure import gap as measure
from opd.models import hub
from opd.models.choice import is_tiny
from opd.models.find import CONFIG
from opd.progress import Progress, Quiet
from opd.prompts.processor import open_encoder, without_family
from opd.run import fingerprints, inputs, preflight, records
from opd.run import recipe as recipes
from opd.run.changed import Changed
from opd.run.export import as_model
from opd.run.folder import RunFolder
from opd.run.probe import answers
from opd.run.recipe import Recipe
from opd.run.trainer import Trainer
from opd.types import Encoder, Example, ModelOptions
from opd.version import __version__
from opd.views.usable import Skipped, Unusable

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
        """Greedy answers to the held-out examples, on the full image and on the crop; and the
        examples that cannot be used.

        Raises DataError where not one of the examples can be.
        """
        progress.begin("measure", 2 * len(self.held_out))
        skipped = Skipped(progress)
        answered = answers(
            self.recipe, self.backend, self.encoder, self.held_out, progress, skipped
        )
        if self.held_out and not answered:
            raise DataError(
                f"none of {plural(len(self.held_out), 'row')} can be measured ({skipped.why()})"
            )
        if missing := len(self.held_out) - len(answered):
            share = (
                f"{missing} of {plural(len(self.held_out), 'row')}"
                f" ({missing / len(self.held_out):.1%})"
            )
            progress.note(f"{share} cannot be used: {skipped.why()}")
        return answered, skipped

    def left_out(self, answered: Sequence[measure.Answered], skipped: Skipped) -> dict[str, Any]:
        """The rows that were not answered, and why: those that could not be read, and those that
        could not be encoded."""
        unread = [
            {"row": row, "reason": reason, "kind": Unusable(reason).kind}
            for row, reason in getattr(self.held_out, "skipped", ())
        ]
        return {
            "rows_skipped": len(unread) + len(self.held_out) - len(answered),
            "skipped": [*unread, *skipped.records()],
        }


@dataclass(frozen=True)
class Opened:
    """All that a session needs but the weights: what can be wrong with a recipe's inputs has been
    told."""

    recipe: Recipe
    name: str
    encoder: Encoder
    options: ModelOptions
    examples: Sequence[Example]
    held_out: Sequence[Example]

    def inputs(self) -> dict[str, Any]:
        """Fingerprints of it all; see `opd.run.inputs`."""
        return {
            "recipe": recipes.without_paths(self.recipe),
            "model": fingerprints.of_model(self.options),
            "data": inputs.of_data(self.examples),
            "measured": inputs.of_data(self.held_out) if self.recipe.measure.path else None,
        }

    def load(self) -> Session:
        """Loads the weights. Raises UserError."""
        model = backends.load(self.name, self.options)
        return Session(self.recipe, self.name, model, self.encoder, self.examples, self.held_out)


def open_session(recipe: Recipe, backend: str, progress: Progress, few: bool = False) -> Session:
    """Opens the model's small files, then data, then weights, so that a mistake is told before
    anything slow. Raises UserError.

    With `few`, only the rows that are measured are read, and `examples` are those.
    """
    return open_inputs(recipe, backend, progress, few).load()


def open_inputs(recipe: Recipe, backend: str, progress: Progress, few: bool = False) -> Opened:
    """Opens the model's small files, then data. Raises UserError."""
    _check_known(backend)
    trained = not few or not recipe.measure.path  # else only what is measured is opened
    for path in ([recipe.data.path] if trained else []) + [recipe.measure.path]:
        if path not in ("", "tiny") and not os.path.exists(path):
            raise DataError(f"data file not found: {path}")
    recipe, name, encoder = _open_small_files(recipe, backend, progress)
    if trained:
        check_data_is_given(recipe)
    examples = None if few else _open_rows(recipe, recipe.data.path, progress)
    measured = held_out(recipe, examples, progress)
    options = _fetch_weights(recipe, name, progress)
    if recipe.model.path == "tiny" != recipe.data.path:
        progress.note(
            "the embedded tiny model knows nothing but its own scenes; a model for your images is"
            " named with --model"
        )
    return Opened(
        recipe, name, encoder, options, measured if examples is None else examples, measured
    )


def open_model(recipe: Recipe, backend: str, progress: Progress) -> Session:
    """Opens the model alone: a session without examples. Raises UserError."""
    _check_known(backend)
    recipe, name, encoder = _open_small_files(recipe, backend, progress)
    return Opened(recipe, name, encoder, _fetch_weights(recipe, name, progress), [], []).load()


def start(
    recipe: Recipe, backend: str, out: Path, force: bool = False, progress: Progress | None = None
) -> Trainer:
    """A trainer in a new run folder `out`. Raises UserError before anything is written where the
    input is wrong."""
    RunFolder.check(out, force)
    opened = open_inputs(recipe, backend, progress or Quiet())
    preflight.check(opened.recipe, opened.encoder, opened.examples, progress or Quiet())
    began = opened.inputs()
    session = opened.load()
    folder = RunFolder(out)
    if session.backend.rank == 0:
        made_with = {
            "backend": session.name,
            "opd": __version__,
            "python": platform.python_version(),
            "packages": _versions(),
            "data": began["data"],
        }
        folder = RunFolder.create(out, recipes.write(_anywhere(session.recipe), made_with), force)
        folder.write(inputs.FILE, {**began, "history": []})
        _tell_unlocked(folder, progress or Quiet())
    return _trainer(session, folder, progress)


def resume(
    path: Path,
    backend: str | None = None,
    progress: Progress | None = None,
    changed: Changed | None = None,
) -> Trainer:
    """A trainer that goes on with the run in `path`, on its own backend or another one, with what
    is `changed` on purpose.

    Raises UserError where the run's inputs are not what the run began with, or another process
    trains there.
    """
    progress, changed = progress or Quiet(), changed or Changed()
    folder = RunFolder.open(path).locked()
    try:
        _tell_unlocked(folder, progress)
        before = inputs.began(folder)
        on_disk = recipes.reread(path / CONFIG)
        _check_goes_on(folder, on_disk)
        records.check(folder)
        recipe, said = changed.applied(on_disk, folder)
        made_with = recipes.read(str(path / CONFIG)).get("made_with", {})
        opened = open_inputs(recipe, backend or made_with.get("backend", "auto"), progress)
        now = opened.inputs()
        differences = inputs.changes(
            before, now, opened.recipe, folder, () if changed.steps is None else ("run.steps",)
        )
        if differences and not changed.accept:
            raise FolderError(
                f"{'; '.join(differences)}; restore it, or go on all the same with --accept-changes"
            )
        preflight.check(opened.recipe, opened.encoder, opened.examples, progress)
        trainer = _trainer(opened.load(), folder, progress)
        try:
            done = trainer.restore()
        except FolderError as error:
            if not differences:
                raise
            raise FolderError(
                f"the checkpoint of '{path}' does not fit what has changed:"
                f" {'; '.join(differences)}; restore it"
            ) from error
        for line in (*said, *(f"accepted: {difference}" for difference in differences)):
            progress.note(line)
        if trainer.backend.rank == 0:
            _write_down(
                folder, on_disk, _anywhere(opened.recipe), {**made_with, "data": now["data"]}
            )
            history = before.get("history", [])
            if said or differences:
                now_in_words = datetime.now(UTC).isoformat(timespec="seconds")
                history = [
                    *history,
                    {"when": now_in_words, "step": done, "changes": [*said, *differences]},
                ]
            folder.write(inputs.FILE, {**now, "history": history})
    except BaseException:
        folder.release()
        raise
    return trainer


def held_out(
    recipe: Recipe, examples: Sequence[Example] | None, progress: Progress | None = None
) -> Sequence[Example]:
    """The rows that are measured, at most measure.count: see `MeasureOptions.path`.

    `examples` are all rows of data.path; where they are None, only the rows that are measured are
    read.
    """
    options = recipe.measure
    if not options.count:
        return []
    if (options.path or recipe.data.path) == "tiny":
        from opd.tiny import Scenes

        return Scenes("fresh", options.count)
    if examples is None or options.path:
        return _open_rows(
            recipe, options.path or recipe.data.path, progress or Quiet(), options.count
        )
    return spread(examples, options.count)


def check_data_is_given(recipe: Recipe) -> None:
    """Raises RecipeError where nobody named the data, and the model is not the one that the default
    data are for."""
    if "path" in recipe.data.model_fields_set or is_tiny(recipe.model.path):
        return
    raise recipes.no_data(recipe.model.path)


def _check_known(backend: str) -> None:
    """Raises BackendError where a backend is unknown or not installed."""
    # which one `auto` is takes seconds: frameworks are imported to see their devices
    if backend != "auto":
        backends.resolve(backend)


def _open_small_files(
    recipe: Recipe, backend: str, progress: Progress
) -> tuple[Recipe, str, Encoder]:
    """The recipe with its model pinned, the backend's name, and the encoder. Raises UserError."""
    with progress.pause():  # a download shows its own bars
        folder = recipe.model.folder(weights=False)
    recipe = _pinned(recipe, folder)
    name = backends.resolve(backend)
    if backends.families_alone(name) and (kind := without_family(folder)):
        raise backends.no_family(name, kind)
    return recipe, name, open_encoder(folder, **recipe.model.pixels())


def _fetch_weights(recipe: Recipe, name: str, progress: Progress) -> ModelOptions:
    """What the backend loads, once it is on this machine. Raises ModelError."""
    as_model(recipe.model.path, name, progress)
    with progress.pause():
        return recipe.model.options(recipe.run.seed)


def _open_rows(
    recipe: Recipe, path: str, progress: Progress, count: int | None = None
) -> Sequence[Example]:
    """All rows of a data file, or so many spread over it; what is wrong with the others is told."""
    options = recipe.data
    examples = open_data(
        path,
        options.strict,
        progress=progress,
        max_image_pixels=options.max_image_pixels,
        count=count,
    )
    if isinstance(examples, Dataset):
        examples.tell(progress)
    return examples


def _check_goes_on(folder: RunFolder, recipe: Recipe) -> None:
    """Raises FolderError where a run is done and its checkpoints are gone: it would begin again."""
    result = recipe.model.result
    if (folder.path / result).is_dir() and not folder.checkpoints():
        raise FolderError(
            f"run '{folder.path}' has {result}/, but no checkpoint to go on from; train its result"
            f" on with: opd train --model {folder.path}"
        )


def _write_down(
    folder: RunFolder, before: Recipe, now: Recipe, made_with: Mapping[str, Any]
) -> None:
    """The recipe that a run goes on with, where it is another one."""
    if now == before:
        return
    result = folder.path / before.model.result
    # of an earlier version, which left no step
    if result.is_dir() and not (result / recipes.BESIDE).exists():
        recipes.leave(before, result, before.run.steps)
    folder.write_config(recipes.write(now, made_with))


def _tell_unlocked(folder: RunFolder, progress: Progress) -> None:
    if folder.lock and not folder.lock.works:
        progress.note(
            f"the file system of '{folder.path}' has no locks: nothing keeps a second process from"
            " training there"
        )


def _pinned(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the commit of a Hugging Face id: a run that is resumed must find the model
    that it began with."""
    commit = (
        hub.commit(folder)
        if hub.is_id(recipe.model.path) and not Path(recipe.model.path).is_dir()
        else ""
    )
    return (
        recipe.model_copy(update={"model": recipe.model.model_copy(update={"revision": commit})})
        if commit
        else recipe
    )


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
