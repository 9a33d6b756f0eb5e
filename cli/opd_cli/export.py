"""`opd export`."""

from __future__ import annotations

from pathlib import Path

import click

from opd_cli.options import UserPath
from opd_cli.terminal import say, say_json


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--as",
    "kind",
    type=click.Choice(["model", "adapter"]),
    default="model",
    show_default=True,
    help="All weights, or LoRA's.",
)
@click.option(
    "--out", type=UserPath(), required=True, help="The folder to write; it must be empty or new."
)
@click.option(
    "--quantize",
    type=click.Choice(["4", "8"]),
    help="Bits per weight, in the layout of mlx-community; needs MLX.",
)
@click.option(
    "--backend", help="Where an unfinished run's checkpoint is loaded.  [default: the run's own]"
)
@click.option(
    "--step",
    type=click.IntRange(min=1),
    help="The step whose checkpoint is exported.  [default: the last]",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout instead of a line."
)
def export(
    run: Path,
    kind: str,
    out: Path,
    quantize: str | None,
    backend: str | None,
    step: int | None,
    as_json: bool,
) -> None:
    """Writes the trained model of RUN as a folder that transformers and mlx-vlm load, or the
    adapter as a folder that PEFT loads.

    If the run is not finished, the newest checkpoint is exported. The chat template in the folder
    is the one that was trained, with thinking off.

    \b
    Examples:
      opd export runs/tiny --out my-model
      opd export runs/tiny --out my-model-4bit --quantize 4
      opd export runs/tiny --out halfway --step 200
      opd export runs/lora --as adapter --out my-adapter
    """
    from opd.run.export import export as write
    from opd_cli.progress import show

    with show() as progress:
        done = write(
            run,
            "adapter" if kind == "adapter" else "model",
            out,
            int(quantize) if quantize else None,
            backend,
            progress,
            step,
        )
    if as_json:
        say_json(done)
    else:
        say(f"{kind}: {out}")
