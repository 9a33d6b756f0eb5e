"""`opd data show`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd.errors import plural
from opd_cli.data.options import DATA, MODEL, OVERRIDES, open_encoder, recipe_of
from opd_cli.options import UserPath
from opd_cli.terminal import say

if TYPE_CHECKING:
    from opd.progress import Progress
    from opd.sheet import Card


@click.command()
@DATA
@click.option(
    "--out", type=UserPath(), required=True, help="The sheet: a picture (.png) or a page (.html)."
)
@click.option("--view", help="What the teacher sees: crop, context, several, ... (docs/views.md).")
@click.option(
    "--count",
    type=click.IntRange(1),
    default=8,
    show_default=True,
    help="Rows, spread evenly over the data.",
)
@MODEL
@OVERRIDES
def show(
    data: str,
    out: Path,
    view: str | None,
    count: int,
    model: str | None,
    overrides: tuple[str, ...],
) -> None:
    """Draws what student and teacher will see of some rows of DATA: the full picture with the
    evidence framed in red, the teacher's pictures, what is asked, answer and sizes.

    The teacher's pictures are made as in training, by the view of the recipe or by --view. The
    frame is not in the student's picture. With --model, tokens are counted, and crops are not
    enlarged above the model's bound.

    \b
    Examples:
      opd data show pairs.jsonl --out sheet.png
      opd data show pairs.jsonl --out sheet.html --count 100 --view context
      opd data show pairs.jsonl --out sheet.png --model tiny --set view.margin=20
    """
    from opd import sheet
    from opd.data import Dataset, open_data
    from opd_cli.progress import show as progress_shown

    sheet.check_free(out, count)
    recipe = recipe_of(data, model, (*overrides, *([f"view.kind={view}"] if view else [])))
    seen = recipe.view.seeded(recipe.run.seed)
    with progress_shown() as progress:
        encoder = open_encoder(recipe, progress) if model else None
        examples = open_data(
            data,
            recipe.data.strict,
            progress=progress,
            max_image_pixels=recipe.data.max_image_pixels,
            count=count,
            evidence=seen.view.needs_evidence,
            reading=recipe.data,
        )
        if isinstance(examples, Dataset):
            examples.tell(progress)
        progress.begin("show", len(examples))
        cards = counted(sheet.cards(examples, seen, encoder), progress)
        rows = getattr(examples, "rows", len(examples))
        shown = (
            f"{plural(len(examples), 'row')} of {rows:,}" if rows > len(examples) else "all rows"
        )
        sheet.write(out, f"{data}: {shown}, view {seen.title}", cards)
    say(f"{out}: {plural(len(examples), 'row')}")


def counted(cards: Iterator[Card], progress: Progress) -> Iterator[Card]:
    """Yields the cards, and advances the progress by each."""
    for card in cards:
        yield card
        progress.advance(1)
