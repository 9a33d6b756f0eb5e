"""The functions that `opd` offers to programs: read data, open a model, measure the gap, train, and
read a run back.

If an input is wrong or a run fails, a function raises an error of `opd.errors`, whose message is
one line. The functions print nothing; they report to a `progress` (`opd.progress.Progress`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from opd.backend import Backend
from opd.data import Dataset, open_data
from opd.errors import DataError, FolderError, ModelError, RecipeError, UserError
from opd.measure.gap import Answered, accuracies
from opd.models.find import CONFIG
from opd.paths import expanded, stem
from opd.progress import Progress, Quiet
from opd.run import inherit, records, session
from opd.run import recipe as recipes
from opd.run.changed import Changed
from opd.run.folder import RunFolder, next_free
from opd.run.monitors import Monitor
from opd.run.recipe import Recipe
from opd.types import MAX_IMAGE_PIXELS, Encoder, Example

if TYPE_CHECKING:
    from typing import Unpack

Rows = list[dict[str, Any]]


class Sections(TypedDict, total=False):
    """Keyword arguments that set keys of a recipe, by section (docs/recipe.md)."""

    model: Mapping[str, Any]
    data: Mapping[str, Any]
    view: Mapping[str, Any]
    rollout: Mapping[str, Any]
    objective: Mapping[str, Any]
    teacher: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    measure: Mapping[str, Any]
    run: Mapping[str, Any]


@dataclass(frozen=True)
class Model:
    """A model on a backend. `name`: the name of the backend. `recipe` says how the model is
    measured."""

    recipe: Recipe
    name: str
    backend: Backend = field(repr=False)
    encoder: Encoder = field(repr=False)


@dataclass(frozen=True)
class Gap:
    """The result of `measure_gap`. Shares are in 0..1, intervals are 95 % intervals.

    `agreement`: the share of all `rows` with equal answers on full image and crop. Both accuracies,
    and `gap`, the crop's accuracy minus the full image's, are over the `rows_with_answer`; None if
    there are none. Rows without boxes and teacher images have no crop: if there are any,
    `crop_rows` counts the others, over which agreement, crop accuracy and gap are. `answers` lists
    every answer, `skipped` the rows that could not be used, each as {"row", "reason", "kind"}.
    """

    rows: int
    rows_with_answer: int
    crop_rows: int | None = None
    agreement: float | None = None
    agreement_interval: tuple[float, float] | None = None
    full_accuracy: float | None = None
    full_accuracy_interval: tuple[float, float] | None = None
    crop_accuracy: float | None = None
    crop_accuracy_interval: tuple[float, float] | None = None
    gap: float | None = None
    gap_interval: tuple[float, float] | None = None
    answers: tuple[Answered, ...] = field(default=(), repr=False)
    skipped: tuple[dict[str, Any], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Run:
    """A run on disk, finished or not. Every property reads a file of the run when it is accessed,
    and raises FolderError if the file is damaged. Rows are plain dictionaries, as pandas takes
    them."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return recipes.reread(self.path / CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """The result of the run: accuracies before and after, the verdict, seconds. Raises
        FolderError if the run is not finished."""
        try:
            return self._folder.read("summary.json")
        except FileNotFoundError as error:
            what = f"run '{self.path}' is not done, so it has no summary"
            raise FolderError(f"{what}; opd.resume goes on with it") from error
        except (OSError, ValueError, RecursionError) as error:
            raise FolderError(f"'{self.path / 'summary.json'}' cannot be read: {error}") from error

    @property
    def metrics(self) -> Rows:
        """One row for each step: loss, divergence, gradient norm, tokens, seconds and more."""
        return records.read(self._folder, records.METRICS)

    @property
    def accuracy(self) -> Rows:
        """One row for each measurement: step, and accuracies, gap and agreement with intervals."""
        return records.read(self._folder, records.ACCURACY)

    @property
    def answers(self) -> Rows:
        """For each measured example one row before training and one after; "when" tells which."""
        return records.read(self._folder, records.ANSWERS)

    @property
    def rollouts(self) -> Rows:
        """Sampled completions of every `run.rollouts_every`-th step, token by token."""
        return records.read(self._folder, records.ROLLOUTS)

    @property
    def skipped(self) -> Rows:
        """One row for each row of the data that could not be used, with row, reason and kind."""
        return records.read(self._folder, records.SKIPPED)

    @property
    def result(self) -> Path:
        """The folder of the trained model or adapter, in Hugging Face layout: model/ or
        adapter/."""
        return self.path / self.recipe.model.result

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.open(self.path)


def read_data(
    path: str | Path = "tiny",
    *,
    count: int | None = None,
    strict: bool = False,
    max_image_pixels: int = MAX_IMAGE_PIXELS,
    evidence: bool = True,
    reading: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Sequence[Example]:
    """The examples of a data file, or of the embedded task if `path` is "tiny".

    `evidence`: whether a row without boxes and teacher's images is faulty. `reading`: keys of the
    recipe's data section that say how the file is read, such as {"format": "zwz"}.

    `count`: at most so many rows, spread evenly over the file. A faulty row, such as one with an
    image of more than `max_image_pixels` pixels, is skipped, and listed in `skipped` of the
    `opd.data.Dataset` that is returned for a file; with `strict` it raises DataError. Raises
    DataError if the file cannot be used.
    """
    progress = progress or Quiet()
    name = str(path) if str(path) == "tiny" else _path(path, DataError)
    said = recipes.validate({"data": {**(reading or {}), "path": name}}, "reading").data
    examples = open_data(
        name,
        strict,
        True,
        progress,
        max_image_pixels,
        count,
        evidence=evidence,
        reading=said,
    )
    if isinstance(examples, Dataset):
        examples.tell(progress)
    return examples


def recipe(source: str | Path | None = None, **sections: Unpack[Sections]) -> Recipe:
    """The recipe of a preset ("tiny", "paper", "lora") or a TOML file, with the keys of `sections`
    set.

    Without `source`, the recipe of the run that trained `model.path`, else the preset for that
    model. Raises RecipeError for an unknown key or a value out of range.
    """
    return _resolved(source, sections, training=True).recipe


def open_model(
    path: str | Path = "tiny",
    *,
    backend: str | None = None,
    progress: Progress | None = None,
    **sections: Unpack[Sections],
) -> Model:
    """Loads a model on a backend ("mlx", "cuda", "cpu"; None or "auto" picks one).

    `path`, as `model.path` of a recipe: "tiny", a folder in Hugging Face layout, a run folder, or a
    Hugging Face id. The model of a run is opened with the run's recipe; `sections` set keys of it.
    Raises UserError if the model or the backend cannot be used.
    """
    progress = progress or Quiet()
    name = str(path) if str(path) == "tiny" else _path(path, ModelError)
    given = _plain(sections)
    given["model"] = {**given.get("model", {}), "path": name}
    resolved = inherit.resolve(None, given, backend=backend, with_data=False)
    if resolved.line:
        progress.note(resolved.line)
    opened = session.open_model(resolved.recipe, resolved.backend, progress)
    return Model(opened.recipe, opened.name, opened.backend, opened.encoder)


def measure_gap(
    model: Model,
    examples: Sequence[Example] | None = None,
    *,
    progress: Progress | None = None,
) -> Gap:
    """Lets a model answer examples greedily, on the full image and on the evidence crop, and
    returns accuracies, gap and answers.

    Without `examples`, the rows that the model's recipe measures. `view`, `measure.max_tokens` and
    `data.max_prompt_tokens` of the recipe apply. Raises DataError if no example can be used.
    """
    progress = progress or Quiet()
    if examples is None:
        session.check_data_is_given(model.recipe)
        examples = session.held_out(model.recipe, None, progress, evidence=False)
    if not len(examples):
        raise DataError("nothing to measure: there are no examples")
    rows = session.Session(
        model.recipe,
        model.name,
        model.backend,
        model.encoder,
        examples,
        held_out=examples,
    )
    answered, skipped = rows.answer(progress)
    left_out = rows.left_out(len(answered), skipped)["skipped"]
    values: dict[str, Any] = accuracies(answered)
    values |= {name: tuple(value) for name, value in values.items() if isinstance(value, list)}
    return Gap(**values, answers=tuple(answered), skipped=tuple(left_out))


def train(
    recipe: Recipe | str | Path | None = None,
    *,
    out: str | Path | None = None,
    backend: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
    monitors: Sequence[Monitor] = (),
    **sections: Unpack[Sections],
) -> Run:
    """Trains a model into a new run folder, and returns the run.

    `recipe`: a result of `opd.recipe`, or an argument of that function; `sections` set keys of it.
    `out`: the run folder; None: runs/NAME, named after recipe or data, or NAME-2, ... if it exists.
    With `force`, a run in `out` is renamed to NAME~1. `monitors` are told of every step
    (`opd.run.monitors.Monitor`).
    Raises UserError, before anything is written, if an input is wrong, RunError if the run fails,
    and Stopped after `progress.stopping` became true. After these and after KeyboardInterrupt,
    `resume` continues the run from the last checkpoint.
    """
    resolved = _resolved(recipe, sections, training=True, backend=backend)
    progress = progress or Quiet()
    if resolved.line:
        progress.note(resolved.line)
    named = resolved.recipe.data.path if recipe is None or isinstance(recipe, Recipe) else recipe
    folder = Path(_path(out)) if out is not None else next_free(Path("runs") / stem(str(named)))
    trainer = session.start(resolved.recipe, resolved.backend, folder, force, progress)
    trainer.monitors = monitors
    trainer.train()
    return Run(folder)


def resume(
    path: str | Path,
    *,
    steps: int | None = None,
    backend: str | None = None,
    data: str | Path | None = None,
    measured: str | Path | None = None,
    model: str | Path | None = None,
    accept_changes: bool = False,
    progress: Progress | None = None,
    monitors: Sequence[Monitor] = (),
) -> Run:
    """Continues a run from the last checkpoint, with the same numbers as without the interruption.

    `steps`: the new number of steps. `data`, `measured`, `model`: the new places of files that were
    moved. Raises FolderError if the run's inputs have changed, unless `accept_changes`; otherwise
    raises as `train` does.
    """
    changed = Changed(_text(data), _text(measured), _text(model), steps, accept_changes)
    trainer = session.resume(Path(_path(path)), backend, progress, changed)
    trainer.monitors = monitors
    trainer.train()
    return Run(trainer.folder.path)


def open_run(path: str | Path) -> Run:
    """The run in the folder `path`, finished or not. Raises FolderError if there is none."""
    run = Run(Path(_path(path)))
    RunFolder.open(run.path)
    return run


def _resolved(
    source: Recipe | str | Path | None,
    sections: Mapping[str, Any],
    training: bool,
    backend: str | None = None,
) -> inherit.Resolved:
    """The recipe of `source` with `sections` set, and the backend to use."""
    given = _plain(sections)
    if not isinstance(source, Recipe):
        text = None if source is None else str(source)
        return inherit.resolve(text, given, training, backend)
    values = recipes.merged(source.model_dump(exclude_unset=True), given)
    return inherit.Resolved(recipes.validate(values, "recipe"), backend=backend or "auto")


def _plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections with paths as text, as in a TOML file. Raises RecipeError for a section that is
    not a mapping."""
    plain = {}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            example = f'{name}={{"key": value}}'
            raise RecipeError(f"{name} = {section!r} is no section of a recipe; write {example}")
        paths = {key: str(value) for key, value in section.items() if isinstance(value, Path)}
        plain[name] = {**section, **paths}
    return plain


def _text(path: str | Path | None) -> str | None:
    """A path as text, or None."""
    return None if path is None else str(path)


def _path(path: str | Path, error: type[UserError] = FolderError) -> str:
    """A path with `~` replaced. Raises `error` if no file can have the path."""
    try:
        return expanded(str(path))
    except ValueError as fault:
        raise error(str(fault)) from fault
