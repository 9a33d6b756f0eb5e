"""`opd data`: each command is a file in this folder, and a line in the table."""

from __future__ import annotations

import click

from opd_cli.lazy import LazyGroup

COMMANDS = {
    "check": "Read every row and picture; count defects, doubtful rows and duplicates.",
    "convert": "Write the rows of any format as opd's own JSON lines.",
    "show": "Draw what student and teacher will see of some rows.",
    "locate": "Find the evidence in rows without boxes, with a model.",
}


@click.group(cls=LazyGroup, package="opd_cli.data", table=COMMANDS)
def data() -> None:
    """Looks at data before training.

    \b
    Examples:
      opd data check pairs.jsonl
      opd data convert train.parquet train.jsonl
      opd data show pairs.jsonl --out sheet.png
      opd data COMMAND --help       what a command takes, with examples
    """
