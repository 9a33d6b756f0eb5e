"""Options that the commands of `opd data` share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from opd_cli.options import resolve

if TYPE_CHECKING:
    from opd.progress import Progress
    from opd.run.recipe import Recipe
    from opd.types import Encoder

DATA = click.argument("data")
OVERRIDES = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SECTION.KEY=VALUE",
    help="Any option of the recipe, such as data.box_format; may be repeated.",
)
MODEL = click.option(
    "--model",
    help=(
        "Count tokens with this model's processor: a folder in Hugging Face layout, a run, a"
        " Hugging Face id, or 'tiny'. Weights are not loaded."
    ),
)


def recipe_of(data: str, model: str | None, overrides: tuple[str, ...]) -> Recipe:
    """The recipe with which `opd train` reads `data` for `model`; without a model, the preset
    lora's. Raises RecipeError."""
    source = "lora" if model is None and data != "tiny" else None
    return resolve(source, {"model.path": model, "data.path": data}, overrides).recipe


def open_encoder(recipe: Recipe, progress: Progress) -> Encoder:
    """The encoder of the recipe's model; a Hugging Face id's small files are downloaded. Raises
    ModelError."""
    from opd.prompts.processor import open_encoder as opened

    with progress.pause():
        folder = recipe.model.folder(weights=False)
    return opened(folder, **recipe.model.pixels())
