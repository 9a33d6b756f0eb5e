"""The `opd` command. Importing it loads neither torch, mlx nor transformers; each command is imported when it is called."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import click

COMMANDS = {
    "train": "Train a model with Vision-OPD, and measure the gap before and after.",
    "gap": "Measure accuracy on the crop and on the full image.",
    "sample": "Show what a model answers on the full image and on the crop.",
    "export": "Write a trained model or adapter for other programs.",
    "plan": "Say what memory and time a run will take, before any weights are there.",
    "backends": "Show which backends are installed, and check them on this device.",
}

SPINS = "2000"
"""How often a thread of torch's on Linux looks for its next piece of work before it sleeps: 300,000 times if nobody says, which are
milliseconds, on the core that encodes the next step's images."""


class Commands(click.Group):
    """Finds `opd NAME` in the module `opd_cli.NAME`, and turns errors into one line and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The commands in the order in which a person meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The command, imported now."""
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"opd_cli.{name}"), name)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that is called; an unknown one is told with its near miss."""
        if args[0] not in COMMANDS:
            from opd.errors import nearest

            raise click.UsageError(f"no such command '{args[0]}'; {nearest(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the list of commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a command. Exit codes: 0 done, 1 the run failed, 2 the input was wrong, 130 interrupted."""
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            os.environ["GOMP_SPINCOUNT"] = SPINS  # torch is not loaded yet, and libgomp reads it as it is
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as stop:
            sys.exit(stop.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except click.exceptions.NoArgsIsHelpError as error:
            click.echo(error.message)
            sys.exit(0)
        except click.UsageError as error:
            where = f" (see: {error.ctx.command_path} --help)" if error.ctx else ""
            _fail(f"{error.format_message().rstrip('.')}{where}", 2)
        except click.ClickException as error:
            _fail(error.format_message(), 2)
        except Exception as error:
            # Imported here: a failure is the only time the core is needed by the group itself.
            from opd.errors import OpdError, Stopped, UserError

            if not isinstance(error, OpdError):
                raise
            _fail(str(error), 2 if isinstance(error, UserError) else 130 if isinstance(error, Stopped) else 1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="vision-opd", prog_name="opd")
def main() -> None:
    """Teach a vision-language model to see in the full image what it can read in a crop (Vision-OPD).

    \b
    opd train                     a tiny embedded model: its gap closes in minutes
    opd train --data my.jsonl     your own images, questions and boxes
    opd COMMAND --help            what a command takes, with examples
    """


def _fail(message: str, code: int) -> None:
    click.echo(f"opd: {message}", err=True)
    sys.exit(code)
