"""A run's result as a folder that other programs load: a Hugging Face model, or a PEFT adapter."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, Literal, TypeAlias

from opd import registry as backends
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
    """Writes the student of the run in `run` into the empty folder `out`; says what was exported.

    A finished run gives what it left behind; an unfinished one its newest checkpoint, on its own
    backend or another one; with `step` the checkpoint of that step. `quantize`: bits per weight, by
    MLX. Raises UserError before anything is written.
    """
    checkpoint = checkpoint_of(run)
    if checkpoint and step is None:
        run, step = checkpoint
    folder = RunFolder.open(run)
    inputs.recorded(folder)  # damage is told
    recipe = recipes.reread(run / CONFIG)
    check_empty(out)
    own: Kind = recipe.model.result
    if kind == "adapter" and own == "model":
        raise RecipeError(
            f"run '{run}' trained all weights, so it has no adapter; export it with --as model"
        )
    if kind == "adapter" and quantize:
        raise RecipeError(
            "--quantize is for --as model: an adapter has no weights that could be quantised"
        )
    write = backends.quantizer() if quantize else None
    result = folder.path / own
    step, source, what = _chosen(folder, recipe, step)
    finished = source == result
    opened = (
        None
        if finished and kind == own
        else _open(recipe, run, source, finished, _backend(run, backend), progress)
    )
    progress.note(what)

    def produce(target: Path) -> None:
        if opened is not None:
            opened[0].export(target, kind)
            opened[1].save(target)
        else:
            copy_result(source, target)
            if kind == "model":  # of an earlier version, perhaps
                open_encoder(source).save(target)

    def fill(target: Path) -> None:
        if write is None:
            produce(target)
        else:
            with tempfile.TemporaryDirectory(
                dir=target.parent, prefix=f"{target.name}.whole"
            ) as whole:
                produce(Path(whole))
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
    """Lets the checkpoint in `path` be a model: writes its student, model or adapter, into it,
    once. Nothing for any other folder."""
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


def _chosen(folder: RunFolder, recipe: Recipe, step: int | None) -> tuple[int, Path, str]:
    """The step that is exported, its folder, and what is told of it. Raises FolderError where there
    is none."""
    result, run, steps = folder.path / recipe.model.result, folder.path, recipe.run.steps
    there = dict(folder.checkpoints())
    if result.is_dir():
        there[recipes.step_of(result, steps)] = result
    if not there:
        raise FolderError(
            f"run '{run}' has neither {result.name}/ nor a checkpoint yet; go on with it: opd train"
            f" --resume {run}"
        )
    if step is None:
        step = max(there)
        # the last checkpoint stands before the result does
        if step < steps or there[step] != result:
            what = "its checkpoint" if there[step] != result else f"{result.name}/"
            return (
                step,
                there[step],
                f"run '{run}' is not finished: exporting {what} of step {step}, of {steps}",
            )
    elif step not in there:
        listed = ", ".join(str(one) for one in sorted(there))
        raise FolderError(
            f"run '{run}' has no checkpoint of step {step}; it has those of: {listed}"
        )
    source = there[step]
    return (
        step,
        source,
        f"exporting {source}" if source == result else f"exporting the checkpoint of step {step}",
    )


def _open(
    recipe: Recipe, run: Path, source: Path, finished: bool, name: str, progress: Progress
) -> tuple[Backend, PromptEncoder]:
    """The backend that holds the student: a checkpoint's, or, of a finished run, the base's weights
    with the adapter added."""
    model = (
        recipe.model.model_copy(update={"path": str(run), "revision": "", "tune": "full"})
        if finished
        else recipe.model
    )
    with progress.pause():  # a base may have to be downloaded
        encoder, options = open_encoder(model.folder(weights=False)), model.options()
    backend = backends.load(name, options)
    if not finished:
        backend.load(source)
    return backend, encoder


def _backend(run: Path, chosen: str | None) -> str:
    """The backend that was asked for, or the run's own."""
    made_with = recipes.read(str(run / CONFIG)).get("made_with", {})
    return chosen or str(made_with.get("backend", "auto"))
