"""`opd sample`."""

from __future__ import annotations

from dataclasses import asdict

import click

from opd_cli.options import PRESET, preset, resolve, shared
from opd_cli.terminal import say_json


@click.command()
@shared
@click.option("--count", type=click.IntRange(min=1), default=8, show_default=True, help="Examples that are shown.")
def sample(
    recipe: str | None, backend: str | None, model: str | None, data: str | None, overrides: tuple[str, ...], as_json: bool, count: int
) -> None:
    """Shows what a model answers on the full image and on the evidence crop, for a few examples.

    With no RECIPE the preset is tiny, and lora where --model names any other model than the embedded one.

    \b
    Examples:
      opd sample
      opd sample --model runs/tiny --count 20
      opd sample --data pairs.jsonl --json
    """
    from opd import run
    from opd_cli.progress import show
    from opd_cli.tables import answers

    chosen = recipe or preset(model, overrides)
    with show() as progress:
        session = run.open_session(
            resolve(chosen, {"model.path": model, "data.path": data, "measure.count": count}, overrides),
            backend or "auto",
            progress,
            few=True,
        )
        if recipe is None:
            progress.note(PRESET.format(chosen))
        answered, skipped = session.answer(progress)
    if as_json:
        found = {
            "model": session.recipe.model.path,
            "answers": [asdict(one) for one in answered],
            "rows_skipped": len(session.held_out) - len(answered),
            "skipped": skipped.records(),
        }
        say_json(found)
    else:
        answers([(session.held_out[one.row].question, one) for one in answered])
