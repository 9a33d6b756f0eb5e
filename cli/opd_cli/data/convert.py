"""`opd data convert`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from opd.errors import DataError, plural
from opd_cli.console import Terminal
from opd_cli.data.options import DATA, OVERRIDES, recipe_of
from opd_cli.data.tables import kinds
from opd_cli.options import UserPath
from opd_cli.terminal import say, say_json


@click.command()
@DATA
@click.argument("out", type=UserPath())
@click.option(
    "--images",
    type=click.Choice(["keep", "copy"]),
    default="keep",
    show_default=True,
    help="Pictures that are files stay where they are, or are copied beside OUT.",
)
@click.option("--force", is_flag=True, help="Replace OUT though another program wrote it.")
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def convert(
    data: str,
    out: Path,
    images: str,
    force: bool,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Writes the rows of DATA, of whatever format, as opd's own JSON lines into OUT.

    Boxes are in pixels of the upright picture, and paths relative to OUT. Pictures that are no
    files (bytes, base64, members of an archive, downloads) are written into OUT-images, named by
    their content. Rows that cannot be read are left out, and counted. Converting again changes
    nothing. The exit code is 2 if no row can be read.

    \b
    Examples:
      opd data convert train.parquet train.jsonl
      opd data convert annotations.json coco.jsonl --set "data.question=What is this?"
      opd data convert train.jsonl portable/train.jsonl --images copy
    """
    from opd.data import convert as writing
    from opd.data.every import open_every
    from opd_cli.progress import show

    writing.check_free(out, force)
    recipe = recipe_of(data, None, overrides)
    with show() as progress:
        rows = open_every(data, recipe.data, progress, evidence=False)
        for note in rows.notes:
            progress.note(note)
        done = writing.convert(rows, out, progress, images == "copy", force)
        for note in rows.remarks.notes():
            progress.note(note)
    if as_json:
        say_json({"out": str(out), "format": rows.format, **asdict(done)})
    else:
        if done.left_out:
            Terminal().print(kinds("left out; of each kind, the first row", done.left_out, False))
        folder = writing.Beside(out, False).folder
        pictures = f", {plural(done.pictures, 'picture')} in {folder}" if done.pictures else ""
        say(f"{out}: {done.written:,} of {plural(done.rows, 'row')}{pictures}")
    if not done.written:
        raise DataError(f"{data}: no usable row of {done.rows:,}; nothing was written")
