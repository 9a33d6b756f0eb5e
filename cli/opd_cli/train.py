"""`opd train`."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("recipe", default="tiny")
@click.option("--backend", default=None, help="auto, mlx, cuda, cpu, or another installed backend.  [default: auto]")
@click.option("--model", help="A folder in Hugging Face layout, a run folder, or 'tiny'.")
@click.option("--data", help="A .jsonl file of images, questions and evidence boxes, or 'tiny'.")
@click.option("--out", type=click.Path(path_type=Path), help="The run folder.  [default: runs/RECIPE, runs/RECIPE-2, ...]")
@click.option("--steps", type=int, help="Optimizer steps.")
@click.option("--seed", type=int, help="Seed of data order and sampling.")
@click.option("--set", "overrides", multiple=True, metavar="SECTION.KEY=VALUE", help="Any other option of the recipe; may be repeated.")
@click.option("--resume", type=click.Path(path_type=Path), metavar="RUN", help="Go on with a run from its last checkpoint.")
@click.option("--force", is_flag=True, help="Where --out holds a run already, set that one aside as NAME~1.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object on stdout.")
@click.pass_context
def train(
    ctx: click.Context,
    recipe: str,
    backend: str | None,
    model: str | None,
    data: str | None,
    out: Path | None,
    steps: int | None,
    seed: int | None,
    overrides: tuple[str, ...],
    resume: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Trains a model with Vision-OPD, and prints accuracy on crop and full image before and after.

    RECIPE is a preset (tiny, paper, lora) or a TOML file; with nothing given it is tiny, which trains an embedded model of 0.6M
    parameters on a synthetic task.

    \b
    Examples:
      opd train
      opd train --backend mlx --steps 50
      opd train lora --model ~/models/Qwen3-VL-2B-Instruct --data pairs.jsonl
      opd train my.toml --set optimizer.learning_rate=1e-5 --set teacher.rule=frozen
      opd train --resume runs/tiny
    """
    from opd import recipe as recipes
    from opd import run
    from opd_cli.progress import show
    from opd_cli.tables import before_after

    if resume is not None:
        given = [name for name in ("model", "data", "out", "steps", "seed", "overrides") if ctx.params[name] not in (None, ())]
        if given or ctx.get_parameter_source("recipe") == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError("--resume goes on with the run's own recipe: give it with --backend and --json at most", ctx)
        with show() as progress:
            trainer = run.resume(resume, backend, progress)
            summary = trainer.train()
    else:
        shortcuts = {"model.path": model, "data.path": data, "run.steps": steps, "run.seed": seed}
        chosen = [f"{key}={json.dumps(value)}" for key, value in shortcuts.items() if value is not None]
        resolved = recipes.load(recipe, [*chosen, *overrides])
        with show() as progress:
            trainer = run.start(resolved, backend or "auto", out or _free(Path("runs") / Path(recipe).stem), force, progress)
            summary = trainer.train()
    if as_json:
        click.echo(json.dumps({**summary, "run": str(trainer.folder.path)}))
    else:
        before_after(summary, trainer.folder.path)


def _free(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist yet."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_name(f"{path.name}-{number}")
    return free
