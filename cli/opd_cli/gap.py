"""`opd gap`."""

from __future__ import annotations

import click

from opd_cli.options import resolve, shared
from opd_cli.terminal import say_json


@click.command()
@shared
@click.option("--count", type=int, help="Rows that are measured.")
@click.option(
    "--view",
    "views",
    multiple=True,
    metavar="VIEW",
    help="Compares what the teacher would see: crop, context, several, ...; more than once.",
)
def gap(
    recipe: str | None,
    backend: str | None,
    model: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    count: int | None,
    views: tuple[str, ...],
) -> None:
    """Measures the gap of a model: accuracy on the evidence crop minus accuracy on the full image,
    with 95 % intervals.

    If rows have no answers, only the agreement of full image and crop is measured. Rows without
    evidence are measured on the full image alone. With --view, every view (docs/views.md) is
    measured on the same rows beside the full image, with the differences between them.

    The model of a run, a checkpoint or an export is measured as in the run: with the run's recipe
    and backend, and with the run's measured data unless --data is given. For any other model,
    without RECIPE, the preset is tiny for the embedded model, else lora.

    \b
    Examples:
      opd gap
      opd gap --model runs/tiny --count 200
      opd gap --data pairs.jsonl --view crop --view context --view several
      opd gap --model ~/models/Qwen3-VL-2B-Instruct --data pairs.jsonl --json
    """
    from opd.measure.compare import report
    from opd.measure.gap import accuracies
    from opd.run.session import open_session
    from opd.views.view import named
    from opd_cli.progress import show
    from opd_cli.tables import compared, measured

    for view in views:
        named(view)  # before anything slow happens
    shortcuts = {"model.path": model, "data.path": data, "measure.count": count}
    with show() as progress:
        resolved = resolve(recipe, shortcuts, overrides, backend=backend)
        session = open_session(resolved.recipe, resolved.backend, progress, few=True)
        if not session.held_out:
            raise click.UsageError("nothing to measure: measure.count is 0")
        if resolved.line:
            progress.note(resolved.line)
        if views:
            found, skipped = session.compare(list(dict.fromkeys(views)), progress)
            result = report(found, session.held_out)
        else:
            answered, skipped = session.answer(progress)
            result = accuracies(answered)
        result |= session.left_out(result["rows"], skipped)
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
        (compared if views else measured)(result, session.recipe.model.path, session.backend.device)
