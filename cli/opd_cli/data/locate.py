"""`opd data locate`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from opd_cli.data.options import DATA, OVERRIDES
from opd_cli.options import UserPath, resolve
from opd_cli.terminal import say, say_json

METHODS = ("attention", "tiles", "grounding")
"""The names in `opd.locate.LOCATORS`, which is imported when the command is called."""


@click.command()
@DATA
@click.option(
    "--by",
    type=click.Choice(METHODS),
    required=True,
    help=(
        "Where the answer's tokens look; the tile on which the model is most certain; or the box"
        " that the model names."
    ),
)
@click.option(
    "--model",
    help="A folder in Hugging Face layout, a run folder, a Hugging Face id, or 'tiny'.",
)
@click.option("--out", type=UserPath(), required=True, help="The file that is written, in JSONL.")
@click.option(
    "--count", type=click.IntRange(min=1), help="Locate so many rows, spread over the data."
)
@click.option(
    "--backend", help="auto, mlx, cuda, cpu, or another installed backend.  [default: auto]"
)
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def locate(
    data: str,
    by: str,
    model: str | None,
    out: Path,
    count: int | None,
    backend: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Finds the evidence in rows without boxes: the model looks once, and OUT gets opd's own rows
    with boxes and a confidence.

    A second call goes on where the first was stopped. docs/boxes.md says what a confidence means,
    what each method costs, and where else boxes come from. Rows in which nothing is found have no
    boxes.

    \b
    Examples:
      opd data locate tiny --by attention --out located.jsonl --count 100
      opd data locate rows.jsonl --by tiles --model ~/models/Qwen3-VL-4B --out boxes.jsonl
    """
    from opd.run.locating import locate_rows
    from opd_cli.progress import show

    shortcuts = {"model.path": model, "data.path": data}
    with show() as progress:
        resolved = resolve(None, shortcuts, overrides, backend=backend)
        result = locate_rows(resolved.recipe, resolved.backend, by, out, count, progress)
    if as_json:
        path = resolved.recipe.model.path
        say_json({"out": str(out), "by": by, "model": path, **asdict(result)})
        return
    found = f"{out}: {result.rows:,} rows, {result.located:,} located by {by}"
    if result.median_confidence is not None and result.median_box_area is not None:
        found += (
            f", median confidence {result.median_confidence:.2f}, median box"
            f" {100 * result.median_box_area:.1f} % of the picture"
        )
    say(found)
