"""Options that several commands share, and the recipe they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import tomli_w

if TYPE_CHECKING:
    from opd.run.inherit import Resolved

Command = TypeVar("Command", bound=Callable[..., Any])


class UserPath(click.Path):
    """A path as a person writes it: `~` is the home folder, and what no file system holds is
    told."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """The path of a text."""
        from opd.paths import expanded

        try:
            return super().convert(expanded(str(value)), parameter, ctx)
        except ValueError as fault:
            self.fail(str(fault), parameter, ctx)


SHARED = (
    click.argument("recipe", required=False),
    click.option(
        "--backend", help="auto, mlx, cuda, cpu, or another installed backend.  [default: auto]"
    ),
    click.option(
        "--model",
        help="A folder in Hugging Face layout, a run folder, a Hugging Face id, or 'tiny'.",
    ),
    click.option(
        "--data", help="A .jsonl file of images, questions and evidence boxes, or 'tiny'."
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="SECTION.KEY=VALUE",
        help="Any other option of the recipe; may be repeated.",
    ),
    click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print one JSON object on stdout instead of a table.",
    ),
)


def shared(command: Command) -> Command:
    """Adds RECIPE, --backend, --model, --data, --set and --json."""
    for decorate in reversed(SHARED):
        command = decorate(command)
    return command


def resolve(
    recipe: str | None,
    shortcuts: Mapping[str, Any],
    overrides: tuple[str, ...],
    training: bool = False,
    backend: str | None = None,
) -> Resolved:
    """The recipe with the command's own options, by their names in it, and then every --set,
    applied; see `opd.run.inherit`."""
    from opd.run.inherit import resolve as resolved

    # As TOML: json leaves characters raw that no text in TOML may hold.
    chosen = [
        tomli_w.dumps({"value": value}).strip().replace("value = ", f"{key}=", 1)
        for key, value in shortcuts.items()
        if value is not None
    ]
    return resolved(recipe, [*chosen, *overrides], training, backend)
