"""Exports the result of a run as a folder that other programs load: a Hugging Face model or a PEFT
adapter."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, TypeAlias

from opd import registry
from opd.backend import Backend
from opd.errors import FolderError, RecipeError
from opd.models.find import CONFIG, checkpoint_of
from opd.models.inert import copy_result
from opd.progress import Progress
from opd.prompts.encoder import PromptEncoder
from opd.prompts.processor import needs_torchvision, open_encoder
from opd.run import inputs
from opd.run import recipe as recipes
from opd.run.files import replace_folder
from opd.run.folder import RunFolder, check_empty
from opd.run.recipe import Recipe

Kind: TypeAlias = Literal["model", "adapter"]


def export(
    run: Path,
    kind: Kind,
    out: Path,
    quantize: int | None,
    backend: str | None,
    progress: Progress,
    step: int | None = None,
) -> dict[str, Any]:
    """Writes the student of the run in `run` into the empty folder `out`. Returns a record of the
    export, which `opd export --json` prints.

    Of a finished run, the result is exported; of an unfinished run, the newest checkpoint, which
    `backend` or the run's backend loads; with `step`, the checkpoint of that step. `quantize`: bits
    per weight, needs MLX. Raises UserError before anything is written.
    """
    checkpoint = checkpoint_of(run)
    if checkpoint and step is None:
        run, step = checkpoint
    folder = RunFolder.open(run)
    inputs.recorded(folder)  # raises FolderError if the folder is damaged
    recipe = recipes.reread(run / CONFIG)
    check_empty(out)
    trained: Kind = recipe.model.result
    if kind == "adapter" and trained == "model":
        raise RecipeError(
            f"run '{run}' trained all weights, so it has no adapter; export it with --as model"
        )
    if kind == "adapter" and quantize:
        raise RecipeError(
            "--quantize is for --as model: an adapter has no weights that could be quantised"
        )
    write = registry.quantizer() if quantize else None
    step, source, line = _source(folder, recipe, step)
    finished = source == folder.path / trained
    opened = None
    if not finished or kind != trained:
        opened = _open(recipe, run, source, finished, _backend(run, backend), progress)
    progress.note(line)

    def fill_whole(target: Path) -> None:
        if opened is not None:
            student, encoder = opened
            student.export(target, kind)
            encoder.save(target)
        else:
            copy_result(source, target)
            if kind == "model":  # results of earlier versions may lack the trained chat template
                open_encoder(source).save(target)

    def fill(target: Path) -> None:
        if write is None:
            fill_whole(target)
        else:
            with tempfile.TemporaryDirectory(
                dir=target.parent, prefix=f"{target.name}.whole"
            ) as whole:
                fill_whole(Path(whole))
                write(Path(whole), target, quantize or 0)
        recipes.write_beside(recipe, target, step)

    replace_folder(out.absolute(), fill)
    if kind == "model" and not quantize and (name := needs_torchvision(out)):
        progress.note(
            f"to load its processor, {name}, transformers needs torchvision beside it: pip install"
            " torchvision"
        )
    return {"run": str(run), "out": str(out), "as": kind, "step": step, "quantize": quantize}


def as_model(path: str, backend: str, progress: Progress) -> None:
    """If `path` is a checkpoint, exports its student into the checkpoint folder, as model/ or
    adapter/, unless that is done already; `backend` loads the student. Raises UserError."""
    checkpoint = checkpoint_of(Path(path))
    if checkpoint is None:
        return
    (run, step), source = checkpoint, Path(path)
    folder = RunFolder.open(run)
    inputs.recorded(folder)
    recipe = recipes.reread(run / CONFIG)
    result = source / recipe.model.result
    if result.is_dir():
        return
    if not os.access(source, os.W_OK):
        raise FolderError(
            f"checkpoint '{path}' cannot be written, and its {result.name} would stand in it;"
            f" export it: opd export {path} --out FOLDER"
        )
    student, encoder = _open(recipe, run, source, False, backend, progress)

    def fill(target: Path) -> None:
        student.export(target, recipe.model.result)
        encoder.save(target)
        recipes.write_beside(recipe, target, step)

    replace_folder(result, fill, shared=True)


def _source(folder: RunFolder, recipe: Recipe, step: int | None) -> tuple[int, Path, str]:
    """The step to export, the folder that holds it, and a line that says so. Raises FolderError if
    there is none."""
    result, run, steps = folder.path / recipe.model.result, folder.path, recipe.run.steps
    folders = dict(folder.checkpoints())
    if result.is_dir():
        folders[recipes.step_of(result, steps)] = result
    if not folders:
        raise FolderError(
            f"run '{run}' has neither {result.name}/ nor a checkpoint yet; go on with it: opd train"
            f" --resume {run}"
        )
    if step is None:
        step = max(folders)
        source = folders[step]
        # The last checkpoint is written before the result.
        if step < steps or source != result:
            what = "its checkpoint" if source != result else f"{result.name}/"
            line = f"run '{run}' is not finished: exporting {what} of step {step}, of {steps}"
            return step, source, line
    elif step not in folders:
        listed = ", ".join(str(saved) for saved in sorted(folders))
        raise FolderError(
            f"run '{run}' has no checkpoint of step {step}; it has those of: {listed}"
        )
    source = folders[step]
    if source == result:
        return step, source, f"exporting {source}"
    return step, source, f"exporting the checkpoint of step {step}"


def _open(
    recipe: Recipe, run: Path, source: Path, finished: bool, name: str, progress: Progress
) -> tuple[Backend, PromptEncoder]:
    """The encoder, and a backend with the student: that of the checkpoint in `source`, or, if the
    run is `finished`, the base model with the adapter merged. Raises UserError."""
    model = recipe.model
    if finished:
        model = model.model_copy(update={"path": str(run), "revision": "", "tune": "full"})
    with progress.pause():  # the base model may be downloaded
        encoder, options = open_encoder(model.folder(weights=False)), model.options()
    backend = registry.load(name, options)
    if not finished:
        backend.load(source)
    return backend, encoder


def _backend(run: Path, chosen: str | None) -> str:
    """The `chosen` backend, else the backend of the run."""
    made_with = recipes.read(str(run / CONFIG)).get("made_with", {})
    return chosen or str(made_with.get("backend", "auto"))
