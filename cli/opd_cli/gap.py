"""`opd gap`."""

from __future__ import annotations

import click

from opd_cli.options import resolve, shared
from opd_cli.terminal import say_json


@click.command()
@shared
@click.option("--count", type=int, help="Rows that are measured.")
def gap(
    recipe: str | None,
    backend: str | None,
    model: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    count: int | None,
) -> None:
    """Measures the gap of a model: accuracy on the evidence crop minus accuracy on the full image,
    with 95 % intervals.

    If rows have no answers, only the agreement of full image and crop is measured.

    The model of a run, a checkpoint or an export is measured as in the run: with the run's recipe
    and backend, and with the run's measured data unless --data is given. For any other model,
    without RECIPE, the preset is tiny for the embedded model, else lora.

    \b
    Examples:
      opd gap
      opd gap --model runs/tiny --count 200
      opd gap --model ~/models/Qwen3-VL-2B-Instruct --data pairs.jsonl --json
    """
    from opd.measure.gap import accuracies
    from opd.run.session import open_session
    from opd_cli.progress import show
    from opd_cli.tables import measured

    shortcuts = {"model.path": model, "data.path": data, "measure.count": count}
    with show() as progress:
        resolved = resolve(recipe, shortcuts, overrides, backend=backend)
        session = open_session(resolved.recipe, resolved.backend, progress, few=True)
        if not session.held_out:
            raise click.UsageError("nothing to measure: measure.count is 0")
        if resolved.line:
            progress.note(resolved.line)
        answered, skipped = session.answer(progress)
        result = {
            **accuracies(answered),
            **session.left_out(answered, skipped),
        }
    if as_json:
        say_json(
            {
                "backend": session.name,
                "device": session.backend.device,
                "model": session.recipe.model.path,
                **result,
            }
        )
    else:
        measured(result, session.recipe.model.path, session.backend.device)
