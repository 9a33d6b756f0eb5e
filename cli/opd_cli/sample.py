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

    The model of a run, a checkpoint or an export answers as in the run: with the run's recipe, and
    with the run's measured data unless --data is given. For any other model, without RECIPE, the
    preset is tiny for the embedded model, else lora.

    \b
    Examples:
      opd sample
      opd sample --model runs/tiny --count 20
      opd sample --data pairs.jsonl --json
    """
    from opd.run.session import open_session
    from opd.views.questions import student_question
    from opd_cli.progress import show
    from opd_cli.tables import answers

    shortcuts = {"model.path": model, "data.path": data, "measure.count": count}
    with show() as progress:
        resolved = resolve(recipe, shortcuts, overrides, backend=backend)
        session = open_session(resolved.recipe, resolved.backend, progress, few=True)
        if resolved.line:
            progress.note(resolved.line)
        answered, skipped = session.answer(progress)

    def question(answer: Answered) -> str:
        """The question in the prompt, including the choices."""
        return student_question(session.held_out[answer.row])

    if as_json:
        say_json(
            {
                "model": session.recipe.model.path,
                "answers": [{**asdict(one), "question": question(one)} for one in answered],
                **session.left_out(len(answered), skipped),
            }
        )
    else:
        answers([(question(answer), answer) for answer in answered])
