"""Options that several commands share, and the recipe they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import tomli_w

if TYPE_CHECKING:
    from opd.recipe import Recipe

Command = TypeVar("Command", bound=Callable[..., Any])

PRESET = "preset {}: no recipe was named"
"""What is told where the preset was chosen by the model."""


class UserPath(click.Path):
    """A path as a person writes it: `~` is the home folder, and what no file system holds is told."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path of a text."""
        from opd.paths import expanded

        try:
            return super().convert(expanded(str(value)), parameter, ctx)
        except ValueError as fault:
            self.fail(str(fault), parameter, ctx)


SHARED = (
    click.argument("recipe", required=False),
    click.option("--backend", help="auto, mlx, cuda, cpu, or another installed backend.  [default: auto]"),
    click.option("--model", help="A folder in Hugging Face layout, a run folder, a Hugging Face id, or 'tiny'."),
    click.option("--data", help="A .jsonl file of images, questions and evidence boxes, or 'tiny'."),
    click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Any other option of the recipe; may be repeated."),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a table."),
)


def shared(command: Command) -> Command:
    """Adds RECIPE, --backend, --model, --data, --set and --json."""
    for decorate in reversed(SHARED):
        command = decorate(command)
    return command


def preset(model: str | None, overrides: tuple[str, ...]) -> str:
    """The preset where no recipe is named."""
    from opd import recipe as recipes

    values: dict[str, Any] = {"model": {"path": model or "tiny"}}
    for override in overrides:
        recipes.assign(values, override)
    return recipes.preset(str(values["model"]["path"]))


def resolve(recipe: str, shortcuts: Mapping[str, Any], overrides: tuple[str, ...]) -> Recipe:
    """The recipe with the command's own options, by their names in it, and then every --set, applied."""
    from opd import recipe as recipes

    # As TOML: json leaves characters raw that no text in TOML may hold.
    chosen = [
        tomli_w.dumps({"value": value}).strip().replace("value = ", f"{key}=", 1) for key, value in shortcuts.items() if value is not None
    ]
    return recipes.load(recipe, [*chosen, *overrides])
