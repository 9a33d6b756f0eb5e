"""Options that several commands share, and the recipe that they give."""

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
    """The type of an option that takes a path: expands `~`, and refuses a path that no file can
    have."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(
        self, value: Any, parameter: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """The expanded path. Fails, in one line, if no file can have it."""
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
    """Adds RECIPE, --backend, --model, --data, --set and --json to a command."""
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
    """The recipe with the command's own options, `shortcuts` by key of the recipe, and then every
    --set; the other arguments as in `opd.run.inherit.resolve`."""
    from opd.run.inherit import resolve as resolved

    # Written as TOML, since JSON leaves characters unescaped that TOML does not allow.
    chosen = [
        tomli_w.dumps({"value": value}).strip().replace("value = ", f"{key}=", 1)
        for key, value in shortcuts.items()
        if value is not None
    ]
    return resolved(recipe, [*chosen, *overrides], training, backend)
