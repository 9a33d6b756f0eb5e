"""A group of commands that imports each when it is called."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import click


class LazyGroup(click.Group):
    """Finds the command NAME of a `package` in the module `package.NAME`. `table`: what each
    command does, in the order of use."""

    def __init__(self, *args: Any, package: str, table: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.package = package
        self.table = table

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands, in the order of use."""
        return list(self.table)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Imports a command; None if there is no command of this name."""
        if name not in self.table:
            return None
        module = importlib.import_module(f"{self.package}.{name}")
        command: click.Command = getattr(module, name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is called. Raises UsageError, with the nearest name, for an unknown
        command."""
        if args[0] not in self.table:
            from opd.errors import nearest

            raise click.UsageError(
                f"no such command '{args[0]}'; {nearest(args[0], self.table)}", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.table.items()))
