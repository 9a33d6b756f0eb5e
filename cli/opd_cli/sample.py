"""`opd sample`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from opd_cli.options import resolve, shared
from opd_cli.terminal import say_json

if TYPE_CHECKING:
    from opd.measure.gap import Answered


@click.command()
@shared
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Examples that are shown.",
)
def sample(
    recipe: str | None,
    backend: str | None,
    model: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    count: int,
) -> None:
    """Shows what a model answers on the full image and on the evidence crop, for a few examples.

    A run's model, its checkpoints and exports are asked as the run measured: with its recipe, and
    its measured data where no --data is given. With no RECIPE and any other model the preset is
    tiny for the embedded model, else lora.

    \b
    Examples:
      opd sample
      opd sample --model runs/tiny --count 20
      opd sample --data pairs.jsonl --json
    """
    from opd.run import session as run
    from opd.views.questions import student_question
    from opd_cli.progress import show
    from opd_cli.tables import answers

    shortcuts = {"model.path": model, "data.path": data, "measure.count": count}
    with show() as progress:
        resolved = resolve(recipe, shortcuts, overrides, backend=backend)
        session = run.open_session(resolved.recipe, resolved.backend, progress, few=True)
        if resolved.line:
            progress.note(resolved.line)
        answered, skipped = session.answer(progress)

    def asked(one: Answered) -> str:
        """The question as the model is asked it: with the options of a choice."""
        return student_question(session.held_out[one.row])

    if as_json:
        found = {
            "model": session.recipe.model.path,
            "answers": [{**asdict(one), "question": asked(one)} for one in answered],
            **session.left_out(answered, skipped),
        }
        say_json(found)
    else:
        answers([(asked(one), one) for one in answered])
