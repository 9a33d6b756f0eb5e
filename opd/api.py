"""A program's view of opd: read data, open a model, measure its gap, train it, and read a run back.

Every function raises one of `opd.errors`, in one line, where its input is wrong or a run fails. All
are silent; a `progress` (see `opd.progress.Progress`) hears what goes on.
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
    """A model on a backend. `name`: the backend's; `recipe`: how the model is measured."""

    recipe: Recipe
    name: str
    backend: Backend = field(repr=False)
    encoder: Encoder = field(repr=False)


@dataclass(frozen=True)
class Gap:
    """What a model reads on the crop and not on the full image. Shares in 0..1, intervals of 95 %.

    `agreement` is over all `rows`; both accuracies and `gap` (crop less full image) are over the
    `rows_with_answer`, and None where there are none. `answers` holds every answer, `skipped` the
    rows that could not be used, each as {"row", "reason", "kind"}.
    """

    rows: int
    rows_with_answer: int
    agreement: float
    agreement_interval: tuple[float, float]
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
    """A run on disk, finished or not; every property reads its file anew, and raises FolderError
    where the file is damaged. Rows are plain dictionaries, as pandas takes them."""

    path: Path

    @property
    def recipe(self) -> Recipe:
        """The recipe that the run was made with."""
        return recipes.reread(self.path / CONFIG)

    @property
    def summary(self) -> dict[str, Any]:
        """What the run came to: accuracies before and after, the verdict, seconds. Raises
        FolderError where the run is not done."""
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
        """One row for each measurement: step, accuracies, gap and agreement, with intervals."""
        return records.read(self._folder, records.ACCURACY)

    @property
    def answers(self) -> Rows:
        """One row for each measured example before training, and one after (`when`)."""
        return records.read(self._folder, records.ANSWERS)

    @property
    def rollouts(self) -> Rows:
        """Sampled completions of every `run.rollouts_every`-th step, token by token."""
        return records.read(self._folder, records.ROLLOUTS)

    @property
    def skipped(self) -> Rows:
        """One row for each row of the data that could not be used: row, reason and kind."""
        return records.read(self._folder, records.SKIPPED)

    @property
    def result(self) -> Path:
        """The folder of what was trained, in Hugging Face layout: model/, or adapter/."""
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
    progress: Progress | None = None,
) -> Sequence[Example]:
    """The examples of a data file, or of the embedded task where `path` is "tiny".

    `count`: so many rows, spread evenly over the file. A faulty row is skipped, and is among
    `skipped` of the `opd.data.Dataset` that a file gives; with `strict` it is an error, as is a
    picture of more than `max_image_pixels`. Raises DataError.
    """
    progress = progress or Quiet()
    there = str(path) if str(path) == "tiny" else _path(path, DataError)
    found = open_data(there, strict, True, progress, max_image_pixels, count)
    if isinstance(found, Dataset):
        found.tell(progress)
    return found


def recipe(source: str | Path | None = None, **sections: Unpack[Sections]) -> Recipe:
    """A recipe: a preset ("tiny", "paper", "lora") or a TOML file, with the keys of `sections` set.

    Without a source it is that of the run which made `model.path`, else the preset for that model.
    Raises RecipeError for an unknown key or a value out of range.
    """
    return _resolved(source, sections, training=True).recipe


def open_model(
    path: str | Path = "tiny",
    *,
    backend: str | None = None,
    progress: Progress | None = None,
    **sections: Unpack[Sections],
) -> Model:
    """A model with its weights on a backend ("mlx", "cuda", "cpu"; None or "auto" picks one).

    `path` is what `model.path` of a recipe takes: "tiny", a folder in Hugging Face layout, a run's
    folder, or a Hugging Face id. A run's model is opened as the run measured it; `sections` change
    that. Raises UserError where the model or the backend cannot be used.
    """
    progress = progress or Quiet()
    there = str(path) if str(path) == "tiny" else _path(path, ModelError)
    given = _plain(sections)
    given["model"] = {**given.get("model", {}), "path": there}
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
    """Greedy answers of a model to examples, on the full image and on the evidence crop, and what
    they say.

    Without `examples`, the rows that the model's recipe measures. The recipe also says how: `view`,
    `measure.max_tokens` and `data.max_prompt_tokens`. Raises DataError where no example can be
    used.
    """
    progress = progress or Quiet()
    if examples is None:
        session.check_data_is_given(model.recipe)
        examples = session.held_out(model.recipe, None, progress)
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
    left_out = rows.left_out(answered, skipped)["skipped"]
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

    `recipe` is one that `opd.recipe` made, or what that function takes; `sections` set keys of it.
    `out`: the run's folder, else runs/NAME after recipe or data, then NAME-2 and so on; with
    `force`, a run that is there is set aside as NAME~1. `monitors` hear of every step
    (`opd.run.monitors.Monitor`). Raises UserError before anything is written, RunError where the
    run cannot go on, and Stopped where `progress.stopping` asks for it; `resume` goes on from the
    last checkpoint, after KeyboardInterrupt too.
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
    """Goes on with a run from its last checkpoint, to the same numbers as without the stop.

    `steps` extends the run; `data`, `measured` and `model` say where a file or folder was moved to.
    Raises FolderError where the run's inputs are not what they were, unless `accept_changes`; else
    as `train`.
    """
    changed = Changed(_text(data), _text(measured), _text(model), steps, accept_changes)
    trainer = session.resume(Path(_path(path)), backend, progress, changed)
    trainer.monitors = monitors
    trainer.train()
    return Run(trainer.folder.path)


def open_run(path: str | Path) -> Run:
    """A run that was made before, finished or not. Raises FolderError where there is none."""
    run = Run(Path(_path(path)))
    RunFolder.open(run.path)
    return run


def _resolved(
    source: Recipe | str | Path | None,
    sections: Mapping[str, Any],
    training: bool,
    backend: str | None = None,
) -> inherit.Resolved:
    """The recipe of a source with `sections` set, and the backend that is asked for."""
    given = _plain(sections)
    if not isinstance(source, Recipe):
        text = None if source is None else str(source)
        return inherit.resolve(text, given, training, backend)
    values = recipes.merged(source.model_dump(exclude_unset=True), given)
    return inherit.Resolved(recipes.validate(values, "recipe"), backend=backend or "auto")


def _plain(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Sections as a TOML file would give them. Raises RecipeError."""
    plain = {}
    for name, section in sections.items():
        if not isinstance(section, Mapping):
            example = f'{name}={{"key": value}}'
            raise RecipeError(f"{name} = {section!r} is no section of a recipe; write {example}")
        paths = {key: str(value) for key, value in section.items() if isinstance(value, Path)}
        plain[name] = {**section, **paths}
    return plain


def _text(path: str | Path | None) -> str | None:
    """A path as text, where there is one."""
    return None if path is None else str(path)


def _path(path: str | Path, error: type[UserError] = FolderError) -> str:
    """A path with `~` replaced. Raises `error` where no file can have it."""
    try:
        return expanded(str(path))
    except ValueError as fault:
        raise error(str(fault)) from fault
