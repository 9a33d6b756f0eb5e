"""A run's result as a folder that other programs load: a Hugging Face model, or a PEFT adapter."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal, TypeAlias

from opd import backend as backends
from opd import recipe as recipes
from opd.backend import Backend
from opd.errors import FolderError, RecipeError
from opd.folder import CONFIG, RunFolder, check_empty
from opd.inert import copy_result
from opd.processor import open_encoder
from opd.progress import Progress
from opd.prompts import PromptEncoder
from opd.recipe import Recipe

Kind: TypeAlias = Literal["model", "adapter"]


def export(run: Path, kind: Kind, out: Path, quantize: int | None, backend: str | None, progress: Progress) -> dict[str, Any]:
    """Writes the student of the run in `run` into the empty folder `out`; says what was exported.

    A finished run gives what it left behind; an unfinished one its newest checkpoint, on its own backend or another one.
    `quantize`: bits per weight, by MLX. Raises UserError before anything is written.
    """
    folder, recipe = RunFolder.open(run), recipes.reread(run / CONFIG)
    check_empty(out)
    own: Kind = recipe.model.result
    if kind == "adapter" and own == "model":
        raise RecipeError(f"run '{run}' trained all weights, so it has no adapter; export it with --as model")
    if kind == "adapter" and quantize:
        raise RecipeError("--quantize is for --as model: an adapter has no weights that could be quantised")
    write = backends.quantizer() if quantize else None
    result, checkpoints = folder.path / own, folder.checkpoints()
    if result.is_dir():
        step, source = recipe.run.steps, result
        what = f"exporting {result}"
    elif checkpoints:
        step, source = checkpoints[-1]
        what = f"run '{run}' is not finished: exporting its checkpoint of step {step}, of {recipe.run.steps}"
    else:
        raise FolderError(f"run '{run}' has neither {own}/ nor a checkpoint yet; go on with it: opd train --resume {run}")

    finished = source == result
    opened = None if finished and kind == own else _open(recipe, run, source, finished, _backend(run, backend), progress)
    progress.note(what)

    def produce(target: Path) -> None:
        if opened is not None:
            opened[0].export(target, kind)
            opened[1].save(target)
            return
        copy_result(source, target)
        if kind == "model":  # of an earlier version, perhaps
            open_encoder(source).save(target)

    def fill(target: Path) -> None:
        if write is None:
            return produce(target)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}.whole") as whole:
            produce(Path(whole))
            write(Path(whole), target, quantize or 0)

    RunFolder(out.parent).fill(out.absolute(), fill)
    return {"run": str(run), "out": str(out), "as": kind, "step": step, "quantize": quantize}


def _open(recipe: Recipe, run: Path, source: Path, finished: bool, name: str, progress: Progress) -> tuple[Backend, PromptEncoder]:
    """The backend that holds the student: a checkpoint's, or, of a finished run, the base's weights with the adapter added."""
    model = recipe.model.model_copy(update={"path": str(run), "revision": "", "tune": "full"}) if finished else recipe.model
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
