"""Opens data and model of a recipe, makes the run folder, and builds the trainer. Mistakes in the
input raise an error before anything is written."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from opd import registry
from opd.backend import Backend
from opd.data import Dataset, may_exist, open_data, spread
from opd.errors import DataError, FolderError, plural
from opd.measure import compare, gap
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
"""Packages whose versions are recorded with a run."""


@dataclass(frozen=True)
class Session:
    """The model and data of a recipe, opened on the backend called `name`. `examples` are trained
    on, `held_out` are measured."""

    recipe: Recipe
    name: str
    backend: Backend
    encoder: Encoder
    examples: Sequence[Example]
    held_out: Sequence[Example]

    def answer(self, progress: Progress) -> tuple[list[gap.Answered], Skipped]:
        """Greedy answers to the held-out examples, on the full image and on the crop, and the
        examples that cannot be used.

        Raises DataError if none of the examples can be used.
        """
        progress.begin("measure", 2 * len(self.held_out))
        skipped = Skipped(progress)
        answered = answers(
            self.recipe, self.backend, self.encoder, self.held_out, progress, skipped
        )
        self._tell_missing(len(answered), skipped, progress)
        return answered, skipped

    def compare(
        self, views: Sequence[str], progress: Progress
    ) -> tuple[compare.Comparison, Skipped]:
        """Greedy answers to the held-out examples, on the full image and on each of the `views`,
        and the examples that cannot be used.

        Raises RecipeError for an unknown view, DataError if none of the examples can be used.
        """
        options = {name: self.recipe.seeded_view.of(name) for name in views}
        progress.begin("measure", len(compare.names_of(options)) * len(self.held_out))
        skipped = Skipped(progress)
        comparison = compare.compare(
            self.backend,
            self.encoder,
            self.held_out,
            options,
            self.recipe.measure.max_tokens,
            self.recipe.rollout.sample_tokens,
            progress.advance,
            self.recipe.data.max_prompt_tokens,
            skipped,
        )
        self._tell_missing(len(comparison.seen), skipped, progress)
        for name, lacking in comparison.lacking.items():
            if lacking.reasons:
                count = plural(len(lacking.reasons), "row")
                progress.note(f"{count} without the view '{name}': {lacking.why()}")
        return comparison, skipped

    def _tell_missing(self, answered: int, skipped: Skipped, progress: Progress) -> None:
        """A note about the held-out examples that were not answered. Raises DataError if none
        was."""
        rows = len(self.held_out)
        if rows and not answered:
            raise DataError(f"none of {plural(rows, 'row')} can be measured ({skipped.why()})")
        if missing := rows - answered:
            share = f"{missing} of {plural(rows, 'row')} ({missing / rows:.1%})"
            progress.note(f"{share} cannot be used: {skipped.why()}")

    def left_out(self, answered: int, skipped: Skipped) -> dict[str, Any]:
        """The number of rows that were not answered, under "rows_skipped", and a record of each,
        with the reason, under "skipped"; the rows could not be read or not be encoded. `answered`
        counts the others."""
        unread = [
            {"row": row, "reason": reason, "kind": Unusable(reason).kind}
            for row, reason in getattr(self.held_out, "skipped", ())
        ]
        return {
            "rows_skipped": len(unread) + len(self.held_out) - answered,
            "skipped": [*unread, *skipped.records()],
        }


@dataclass(frozen=True)
class Opened:
    """Everything that a session needs except the weights. All checks of the recipe's inputs have
    passed."""

    recipe: Recipe
    name: str
    encoder: Encoder
    options: ModelOptions
    examples: Sequence[Example]
    held_out: Sequence[Example]

    def inputs(self) -> dict[str, Any]:
        """Fingerprints of recipe, model and data, as in `opd.run.inputs`."""
        return {
            "recipe": recipes.without_paths(self.recipe),
            "model": fingerprints.of_model(self.options),
            "data": inputs.of_data(self.examples),
            "measured": inputs.of_data(self.held_out) if self.recipe.measure.path else None,
        }

    def load(self) -> Session:
        """Loads the weights. Raises UserError."""
        model = registry.load(self.name, self.options)
        return Session(self.recipe, self.name, model, self.encoder, self.examples, self.held_out)


def open_session(recipe: Recipe, backend: str, progress: Progress, few: bool = False) -> Session:
    """Opens the model's small files, then the data, then the weights, so that a mistake raises
    UserError before anything slow happens.

    With `few`, only the measured rows are read, and `examples` are the same as `held_out`.
    """
    return open_inputs(recipe, backend, progress, few).load()


def open_inputs(recipe: Recipe, backend: str, progress: Progress, few: bool = False) -> Opened:
    """Opens the model's small files, then the data; `few` as in `open_session`. Raises
    UserError."""
    _check_known(backend)
    trained = not few or not recipe.measure.path  # else only the measured file is opened
    for path in ([recipe.data.path] if trained else []) + [recipe.measure.path]:
        if path not in ("", "tiny") and not may_exist(path):
            raise DataError(f"data file not found: {path}")
    recipe, name, encoder = _open_small_files(recipe, backend, progress)
    if trained:
        check_data_is_given(recipe)
    # Rows without evidence are measured on the full image alone.
    evidence = recipe.view.view.needs_evidence and not few
    examples = None if few else _open_rows(recipe, recipe.data.path, progress, evidence=evidence)
    measured = held_out(recipe, examples, progress, evidence)
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
    """Opens the model without data: a session without examples. Raises UserError."""
    _check_known(backend)
    recipe, name, encoder = _open_small_files(recipe, backend, progress)
    return Opened(recipe, name, encoder, _fetch_weights(recipe, name, progress), [], []).load()


def open_rows(recipe: Recipe, backend: str, progress: Progress, count: int | None) -> Opened:
    """Opens the model's small files, then rows of data.path with or without evidence: all, or
    `count` spread over the file. Raises UserError."""
    _check_known(backend)
    if recipe.data.path != "tiny" and not may_exist(recipe.data.path):
        raise DataError(f"data file not found: {recipe.data.path}")
    recipe, name, encoder = _open_small_files(recipe, backend, progress)
    rows = _open_rows(recipe, recipe.data.path, progress, count, evidence=False)
    return Opened(recipe, name, encoder, _fetch_weights(recipe, name, progress), rows, [])


def start(
    recipe: Recipe, backend: str, out: Path, force: bool = False, progress: Progress | None = None
) -> Trainer:
    """The trainer of a new run in the folder `out`; with `force` it replaces an older run. Raises
    UserError, before anything is written, if the input is wrong."""
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
        folder = RunFolder.create(out, recipes.write(_absolute(session.recipe), made_with), force)
        folder.write(inputs.FILE, {**began, "history": []})
        _tell_unlocked(folder, progress or Quiet())
    return _trainer(session, folder, progress)


def resume(
    path: Path,
    backend: str | None = None,
    progress: Progress | None = None,
    changed: Changed | None = None,
) -> Trainer:
    """The trainer that continues the run in `path`, on the run's backend or on `backend`, with the
    changes in `changed`.

    Raises UserError if the inputs differ from those that the run began with, or if another process
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
        recipe, lines = changed.applied(on_disk, folder)
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
        for line in (*lines, *(f"accepted: {difference}" for difference in differences)):
            progress.note(line)
        if trainer.backend.rank == 0:
            _write_recipe(
                folder, on_disk, _absolute(opened.recipe), {**made_with, "data": now["data"]}
            )
            history = before.get("history", [])
            if lines or differences:
                when = datetime.now(UTC).isoformat(timespec="seconds")
                entry = {"when": when, "step": done, "changes": [*lines, *differences]}
                history = [*history, entry]
            folder.write(inputs.FILE, {**now, "history": history})
    except BaseException:
        folder.release()
        raise
    return trainer


def held_out(
    recipe: Recipe,
    examples: Sequence[Example] | None,
    progress: Progress | None = None,
    evidence: bool = True,
) -> Sequence[Example]:
    """The rows that are measured, at most measure.count: fresh scenes, rows of measure.path, or
    rows spread over data.path, as `MeasureOptions.path` describes.

    `examples`: all rows of data.path; None: they are not opened, and only the measured rows are
    read. `evidence` as in `open_data`.
    """
    options = recipe.measure
    if not options.count:
        return []
    if (options.path or recipe.data.path) == "tiny":
        from opd.tiny import Scenes

        return Scenes("fresh", options.count)
    if examples is None or options.path:
        path = options.path or recipe.data.path
        return _open_rows(recipe, path, progress or Quiet(), options.count, evidence)
    return spread(examples, options.count)


def check_data_is_given(recipe: Recipe) -> None:
    """Raises RecipeError if the recipe does not name data and the model is not the embedded one, to
    which the default data belong."""
    if "path" in recipe.data.model_fields_set or is_tiny(recipe.model.path):
        return
    raise recipes.no_data(recipe.model.path)


def _check_known(backend: str) -> None:
    """Raises BackendError if the backend is unknown or not installed."""
    # Resolving `auto` takes seconds, since it imports frameworks to see their devices.
    if backend != "auto":
        registry.resolve(backend)


def _open_small_files(
    recipe: Recipe, backend: str, progress: Progress
) -> tuple[Recipe, str, Encoder]:
    """The recipe with the model's commit, the name of the backend, and the encoder. Raises
    UserError."""
    with progress.pause():  # a download shows progress bars of huggingface_hub
        folder = recipe.model.folder(weights=False)
    recipe = _pinned(recipe, folder)
    name = registry.resolve(backend)
    if registry.families_alone(name) and (kind := without_family(folder)):
        raise registry.no_family(name, kind)
    return recipe, name, open_encoder(folder, **recipe.model.pixels())


def _fetch_weights(recipe: Recipe, name: str, progress: Progress) -> ModelOptions:
    """Downloads the weights if needed; returns the options with which the backend loads them.
    Raises ModelError."""
    as_model(recipe.model.path, name, progress)
    with progress.pause():
        return recipe.model.options(recipe.run.seed)


def _open_rows(
    recipe: Recipe,
    path: str,
    progress: Progress,
    count: int | None = None,
    evidence: bool = True,
) -> Sequence[Example]:
    """All usable rows of a data file, or `count` rows spread over it; tells `progress` about the
    others. `evidence` as in `open_data`."""
    options = recipe.data
    examples = open_data(
        path,
        options.strict,
        progress=progress,
        max_image_pixels=options.max_image_pixels,
        count=count,
        evidence=evidence,
        reading=options,
    )
    if isinstance(examples, Dataset):
        examples.tell(progress)
    return examples


def _check_goes_on(folder: RunFolder, recipe: Recipe) -> None:
    """Raises FolderError if a finished run has no checkpoint: training would start over."""
    result = recipe.model.result
    if (folder.path / result).is_dir() and not folder.checkpoints():
        raise FolderError(
            f"run '{folder.path}' has {result}/, but no checkpoint to go on from; train its result"
            f" on with: opd train --model {folder.path}"
        )


def _write_recipe(
    folder: RunFolder, before: Recipe, now: Recipe, made_with: Mapping[str, Any]
) -> None:
    """Writes config.toml if the recipe has changed."""
    if now == before:
        return
    result = folder.path / before.model.result
    # Earlier versions wrote no recipe beside the result.
    if result.is_dir() and not (result / recipes.BESIDE).exists():
        recipes.write_beside(before, result, before.run.steps)
    folder.write_config(recipes.write(now, made_with))


def _tell_unlocked(folder: RunFolder, progress: Progress) -> None:
    """Tells `progress` if the file system has no locks."""
    if folder.lock and not folder.lock.works:
        progress.note(
            f"the file system of '{folder.path}' has no locks: nothing keeps a second process from"
            " training there"
        )


def _pinned(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the current commit as revision if the model is a Hugging Face id, so that a
    resumed run finds the same model."""
    is_folder = Path(recipe.model.path).is_dir()
    commit = hub.commit(folder) if hub.is_id(recipe.model.path) and not is_folder else ""
    if not commit:
        return recipe
    model = recipe.model.model_copy(update={"revision": commit})
    return recipe.model_copy(update={"model": model})


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


def _absolute(recipe: Recipe) -> Recipe:
    """The recipe with absolute paths, so that the run can be resumed from any folder."""

    def section(name: str) -> Any:
        options = getattr(recipe, name)
        path = Path(options.path)
        if options.path in ("", "tiny") or not path.exists():
            return options
        absolute = {"path": str(path.resolve())}
        if getattr(options, "images", ""):
            absolute["images"] = str(Path(options.images).resolve())
        return options.model_copy(update=absolute)

    return recipe.model_copy(update={name: section(name) for name in ("model", "data", "measure")})


def _versions() -> dict[str, Any]:
    """Versions of the installed packages among PACKAGES, by name."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
