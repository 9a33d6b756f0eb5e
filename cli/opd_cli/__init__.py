"""The `opd` command. Importing this package loads neither torch, mlx nor transformers; each command
is imported when it is called."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

from opd_cli import signals, terminal
from opd_cli.lazy import LazyGroup
from opd_cli.suggestions import unknown_option, where

COMMANDS = {
    "train": "Train a model with Vision-OPD, and measure the gap before and after.",
    "gap": "Measure accuracy on the crop and on the full image.",
    "sample": "Show what a model answers on the full image and on the crop.",
    "export": "Write a trained model or adapter for other programs.",
    "data": "Look at data before training: check, convert, show; locate evidence.",
    "plan": "Say what memory and time a run will take, before any weights are there.",
    "backends": "Show which backends are installed, and check them on this device.",
}

WINDOWS = (
    "Windows is not supported; install and run opd inside WSL, the Windows Subsystem for Linux"
)
"""The error on Windows: opd uses the locks, resource limits and signals of POSIX."""

SPINS = "2000"
"""How often an idle OpenMP thread of torch polls for work before it sleeps. The default of 300,000
takes milliseconds of the core that encodes the next step's images."""


class Commands(LazyGroup):
    """The commands of `opd`; turns errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        """Calls the command. A KeyboardInterrupt becomes Abort, since click would write an empty
        line for it."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.Abort from None

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs a command and exits with its code.

        0: done; 1: the run failed, or stdout cannot be written; 2: the input is wrong; 130, 143,
        129: Ctrl-C, SIGTERM, SIGHUP; 141: the reader of stdout has gone. An error is one line. A
        traceback is a fault of opd, and its last line says so.
        """
        if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & os.environ.keys():
            # libgomp reads the variable when torch is loaded, which happens later.
            os.environ["GOMP_SPINCOUNT"] = SPINS
        with terminal.prepared() as stdout, signals.handled() as heard:
            try:
                code = self._run(heard, *args, **kwargs)
                stdout.flush()
            except terminal.StdoutError as error:
                stdout.give_up()
                code = 141 if error.unread else _fail(f"stdout cannot be written: {error}", 1)
            except KeyboardInterrupt:  # a second one, while the first was being reported
                code = heard.exit_code
        if code:
            sys.exit(code)

    def _run(self, heard: signals.Signals, *args: Any, **kwargs: Any) -> int:
        """Runs a command and returns the exit code."""
        if args:
            given = list(args[0])
        elif kwargs.get("args") is not None:
            given = list(kwargs["args"])
        else:
            given = sys.argv[1:]
        try:
            if sys.platform == "win32":
                raise click.UsageError(WINDOWS)
            for argument in given:
                _check(argument)
            super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as stop:
            return stop.exit_code
        except SystemExit as stop:  # `opd backends --check` with a failed check
            return stop.code if isinstance(stop.code, int) else 1
        except (click.Abort, KeyboardInterrupt):
            return _fail("interrupted", heard.exit_code)
        except click.exceptions.NoArgsIsHelpError as error:
            sys.stdout.write(error.message + "\n")
        except click.NoSuchOption as error:
            return _fail(unknown_option(error, given), 2)
        except click.UsageError as error:
            return _fail(f"{error.format_message().rstrip('.')}{where(error.ctx)}", 2)
        except click.ClickException as error:
            return _fail(error.format_message(), 2)
        except terminal.StdoutError:
            raise
        except MemoryError:
            return _fail("not enough memory on this machine; opd plan says what a run takes", 1)
        except Exception as error:
            # Imported here, since only a failure needs the core.
            from opd.errors import OpdError, Stopped, UserError

            if isinstance(error, UserError):
                return _fail(str(error), 2)
            if isinstance(error, Stopped):
                return _fail(str(error), heard.exit_code)
            if isinstance(error, OpdError):
                return _fail(str(error), 1)
            terminal.say_bug(error)
            return 1
        return 0


@click.group(
    cls=Commands,
    package="opd_cli",
    table=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
@click.version_option(package_name="vision-opd", prog_name="opd")
def main() -> None:
    """Teach a vision-language model to see in the full image what it can read in a crop
    (Vision-OPD).

    \b
    opd train                     a tiny embedded model: its gap closes in minutes
    opd train --data my.jsonl     your own images, questions and boxes
    opd COMMAND --help            what a command takes, with examples
    """


def _check(argument: str) -> None:
    """Raises UsageError for an argument that is not valid UTF-8 or holds NUL, since neither a
    recipe nor a run folder can hold it."""
    if "\0" in argument:
        raise click.UsageError(f"{argument}: an argument cannot hold a NUL character")
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise click.UsageError(
            f"{argument}: not UTF-8; rename the file, or set a UTF-8 locale such as LC_ALL=C.UTF-8"
        ) from None


def _fail(message: str, code: int) -> int:
    """Writes an error to stderr and returns the exit code."""
    terminal.say_error(message)
    return code
