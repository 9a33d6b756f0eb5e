"""`opd train`."""

from __future__ import annotations

from pathlib import Path

import click

from opd_cli.options import PRESET, UserPath, preset, resolve, shared
from opd_cli.terminal import say_json


@click.command()
@shared
@click.option("--out", type=UserPath(), help="The run folder.  [default: runs/NAME after recipe or data, NAME-2, ...]")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Seed of data order and sampling.")
@click.option("--resume", type=UserPath(), metavar="RUN", help="Go on with a run from its last checkpoint.")
@click.option("--force", is_flag=True, help="Where --out holds a run already, set that one aside as NAME~1.")
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
) -> None:
    """Trains a model with Vision-OPD, and prints accuracy on crop and full image before and after.

    RECIPE is a preset (tiny, paper, lora) or a TOML file. With none given it is tiny, which trains an embedded model of 0.6M
    parameters on a synthetic task, and lora where --model names any other model. Every key that --set takes, with its default:
    docs/recipe.md.

    \b
    Examples:
      opd train
      opd train --backend mlx --steps 50
      opd train paper --model ~/models/Qwen3-VL-2B-Instruct --data pairs.jsonl
      opd train my.toml --steps 50 --set teacher.rule=frozen
      opd train --resume runs/tiny
    """
    from opd import run
    from opd.errors import Stopped
    from opd.paths import stem
    from opd_cli.progress import show
    from opd_cli.tables import before_after

    with show() as progress:
        if resume is not None:
            given = [name for name, value in ctx.params.items() if value and name not in ("recipe", "backend", "as_json", "resume")]
            if given or recipe is not None:
                raise click.UsageError("--resume goes on with the run's own recipe: give it with --backend and --json at most", ctx)
            trainer = run.resume(resume, backend, progress)
        else:
            shortcuts = {"model.path": model, "data.path": data, "run.steps": steps, "run.seed": seed}
            chosen = recipe or preset(model, overrides)
            named_after = data if data and recipe is None else chosen
            folder = out or _free(Path("runs") / stem(named_after))
            trainer = run.start(resolve(chosen, shortcuts, overrides), backend or "auto", folder, force, progress)
            if recipe is None:
                progress.note(PRESET.format(chosen))
        try:
            summary = trainer.train()
        except KeyboardInterrupt:
            raise Stopped(f"interrupted; go on with: opd train --resume {trainer.folder.path}") from None
    if as_json:
        say_json({**summary, "run": str(trainer.folder.path)})
    else:
        before_after(summary, trainer.folder.path)


def _free(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
