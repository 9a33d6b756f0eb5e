"""`opd data check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click
from rich import box
from rich.table import Table
from rich.text import Text

from opd.errors import DataError, plural
from opd_cli.console import Terminal, cell
from opd_cli.data.options import DATA, MODEL, OVERRIDES, open_encoder, recipe_of
from opd_cli.data.tables import kinds
from opd_cli.terminal import say_json

if TYPE_CHECKING:
    from opd.data.check import Use
    from opd.data.every import EveryRow
    from opd.run.recipe import Recipe
    from opd.types import Encoder

SIZES = ("min", "median", "p95", "p99", "max")


@click.command()
@DATA
@MODEL
@click.option("--against", metavar="DATA2", help="Also look for pictures of these data.")
@OVERRIDES
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def check(
    data: str,
    model: str | None,
    against: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Reads every row and every picture of DATA, and says which rows training cannot use, which
    are doubtful, how large boxes and prompts are, and which pictures occur twice.

    --against finds pictures of DATA that other data hold too, such as those of a benchmark. The
    exit code is 2 if no row can be used.

    \b
    Examples:
      opd data check pairs.jsonl
      opd data check pairs.jsonl --model ~/models/Qwen3-VL-2B-Instruct
      opd data check pairs.jsonl --against benchmark.jsonl --json
      opd data check boxes.jsonl --set data.max_image_pixels=400000000
    """
    from opd.data import DataOptions
    from opd.data.check import check as checked
    from opd.data.duplicates import check_installed
    from opd.data.every import open_every
    from opd_cli.progress import show

    check_installed()
    recipe = recipe_of(data, model, overrides)
    with show() as progress:
        encoder = open_encoder(recipe, progress) if model else None
        rows = open_every(data, recipe.data, progress, recipe.view.view.needs_evidence)
        # How DATA are read says nothing about other data.
        plain = DataOptions(max_image_pixels=recipe.data.max_image_pixels)
        others = open_every(against, plain, progress, evidence=False) if against else None
        for note in (*rows.notes, *(others.notes if others else ())):
            progress.note(note)
        result = checked(rows, use_of(recipe, rows, encoder), progress, others)
        for note in rows.remarks.notes():
            progress.note(note)
    if as_json:
        say_json(result)
    else:
        print_findings(result, data)
    if not result["usable"]:
        raise DataError(f"{data}: no usable row of {result['rows']:,}")


def use_of(recipe: Recipe, rows: EveryRow, encoder: Encoder | None) -> Use:
    """How training with `recipe` uses the rows; without an encoder, whether the view can be
    made."""
    from opd.data.check import Use
    from opd.types import Example, ImageSource
    from opd.views.images import teacher_sizes
    from opd.views.usable import lengths, too_long

    def size_of(source: ImageSource, max_pixels: int) -> tuple[int, int]:
        return rows.size(source)

    def tokens(example: Example) -> tuple[int, int] | None:
        if encoder is not None:
            return lengths(encoder, example, recipe.seeded_view, size_of)
        teacher_sizes(example, recipe.seeded_view, size_of=size_of)
        return None

    return Use(tokens, recipe.data.max_prompt_tokens, too_long)


def print_findings(result: Mapping[str, Any], data: str) -> None:
    """Prints what was found as tables."""
    console = Terminal()
    usable = f"{result['usable']:,} of {plural(result['rows'], 'row')} can be used"
    console.print(cell(f"{data}: {result['format']}, {usable}", "bold"), soft_wrap=True)
    if result["defects"]:
        # A reason says what its kind says.
        console.print(
            kinds("cannot be used; of each kind, the first row", result["defects"], False)
        )
    if result["warnings"]:
        console.print(kinds("doubtful", result["warnings"], True))
    sizes = _sizes(result)
    if sizes.row_count:
        console.print(sizes)
    for line in _twice(result):
        console.print(line)


def _sizes(result: Mapping[str, Any]) -> Table:
    """Quantiles of boxes and prompts."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("size")
    for name in SIZES:
        table.add_column({"p95": "95 %", "p99": "99 %"}.get(name, name), justify="right")
    area = result["box_area"]
    if area:
        shares = (f"{100 * area[name]:.2g} %" if name in area else "-" for name in SIZES)
        table.add_row("box, of its picture", *shares)
    for policy, tokens in result["tokens"].items():
        if tokens:
            counts = (f"{tokens[name]:,}" if name in tokens else "-" for name in SIZES)
            table.add_row(f"{policy}'s prompt, tokens", *counts)
    return table


def _twice(result: Mapping[str, Any]) -> list[Text]:
    """Lines about pictures that occur twice."""
    twice = result["duplicates"]
    lines = []
    if twice["exact"] or twice["near"]:
        earlier, later = twice["first"][0]
        lines += [
            cell(
                f"pictures of an earlier row under another name: {twice['exact']:,} exact,"
                f" {twice['near']:,} near; the first: {later} as {earlier}"
            )
        ]
    if result["overlap"] is not None:
        lines += [cell(f"rows with a picture of the other data: {result['overlap']:,}")]
    if lines:
        lines += [cell(twice["rule"], "bright_black")]
    return lines
