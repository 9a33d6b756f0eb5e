"""`opd train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from opd_cli.options import UserPath, resolve, shared
from opd_cli.terminal import say_json

if TYPE_CHECKING:
    from opd.run.changed import Changed

RESUMED = (
    "--steps extends the run, --data, --model and --set measure.path say where something was moved,"
    " and what is edited in config.toml needs --accept-changes"
)


@click.command()
@shared
@click.option(
    "--out",
    type=UserPath(),
    help="The run folder.  [default: runs/NAME after recipe or data, NAME-2, ...]",
)
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Seed of data order and sampling.")
@click.option(
    "--resume", type=UserPath(), metavar="RUN", help="Go on with a run from its last checkpoint."
)
@click.option(
    "--force", is_flag=True, help="Where --out holds a run already, set that one aside as NAME~1."
)
@click.option(
    "--accept-changes",
    is_flag=True,
    help="With --resume: go on although model, data or recipe are not what they were.",
)
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str | None,
    backend: str | None,
    model: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    out: Path | None,
    steps: int | None,
    seed: int | None,
    resume: Path | None,
    force: bool,
    accept_changes: bool,
) -> None:
    """Trains a model with Vision-OPD, and prints accuracy on crop and full image before and after.

    RECIPE is a preset (tiny, paper, lora) or a TOML file. Without RECIPE, the model of a run, a
    checkpoint or an export is trained further with the run's recipe except data and seed; the
    embedded model of 0.6M parameters is trained with the preset tiny on a synthetic task, and any
    other model with lora. docs/recipe.md lists every key that --set takes, with the default.

    \b
    Examples:
      opd train
      opd train --backend mlx --steps 50
      opd train paper --model ~/models/Qwen3-VL-2B-Instruct --data pairs.jsonl
      opd train my.toml --steps 50 --set teacher.rule=frozen
      opd train --resume runs/tiny
      opd train --resume runs/tiny --steps 800
    """
    from opd.errors import Stopped
    from opd.paths import stem
    from opd.run import session
    from opd.run.folder import next_free
    from opd_cli.progress import show
    from opd_cli.tables import before_after

    with show() as progress:
        if resume is not None:
            trainer = session.resume(resume, backend, progress, _changed(ctx))
        elif accept_changes:
            raise click.UsageError(
                "--accept-changes is for --resume: a new run has nothing that could have changed",
                ctx,
            )
        else:
            shortcuts = {
                "model.path": model,
                "data.path": data,
                "run.steps": steps,
                "run.seed": seed,
            }
            resolved = resolve(recipe, shortcuts, overrides, training=True, backend=backend)
            folder = out or next_free(Path("runs") / stem(recipe or resolved.recipe.data.path))
            trainer = session.start(resolved.recipe, resolved.backend, folder, force, progress)
            if resolved.line:
                progress.note(resolved.line)
        try:
            summary = trainer.train()
        except KeyboardInterrupt:
            raise Stopped(
                f"interrupted; go on with: opd train --resume {trainer.folder.path}"
            ) from None
    if as_json:
        say_json({**summary, "run": str(trainer.folder.path)})
    else:
        before_after(summary, trainer.folder.path)


def _changed(ctx: click.Context) -> Changed:
    """The changes to a resumed run that the options ask for. Raises UsageError for an option that a
    resumed run cannot take."""
    from opd.run.changed import Changed

    given = ctx.params
    if str(given["resume"]).startswith("-"):
        raise click.UsageError(
            f"--resume names the run that goes on, but '{given['resume']}' follows it", ctx
        )
    for option in ("recipe", "out", "seed", "force"):
        if given[option] is not None and given[option] is not False:
            name = "RECIPE" if option == "recipe" else f"--{option}"
            raise click.UsageError(
                f"--resume goes on with the run's own recipe, so {name} has no place beside it;"
                f" {RESUMED}",
                ctx,
            )
    measured = None
    for override in given["overrides"]:
        key, _, value = override.partition("=")
        if key.strip() != "measure.path" or not value:
            raise click.UsageError(
                f"--resume goes on with the run's own recipe, so --set {key} has no place beside"
                f" it; {RESUMED}",
                ctx,
            )
        measured = value.strip().strip("'\"")
    return Changed(given["data"], measured, given["model"], given["steps"], given["accept_changes"])
