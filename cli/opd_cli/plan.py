"""`opd plan`."""

from __future__ import annotations

import re

import click

from opd_cli.options import resolve, shared
from opd_cli.terminal import say_json


def _size(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """Width and height of an option written 1024x768."""
    if value is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value)
    if found is None:
        raise click.UsageError(f"--{parameter.name} {value}: write it as WIDTHxHEIGHT in pixels, such as 1024x768", ctx)
    return int(found[1]), int(found[2])


@click.command()
@shared
@click.option("--device", "device_name", default="this machine", show_default=True, help="M4 Max, RTX 4090, H200, or this machine.")
@click.option("--image", callback=_size, metavar="WxH", help="Pixels of an image.  [default: the data's first, else 1024x768]")
@click.option("--crop", callback=_size, metavar="WxH", help="Pixels of a crop.  [default: the data's first, else half of the image]")
@click.option("--text-tokens", type=click.IntRange(1), help="Tokens of a prompt beside those of its image.  [default: 64]")
@click.option("--completion-tokens", type=click.IntRange(1), help="Tokens of a completion.  [default: rollout.max_tokens]")
def plan(
    recipe: str | None,
    backend: str | None,
    model: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    device_name: str,
    image: tuple[int, int] | None,
    crop: tuple[int, int] | None,
    text_tokens: int | None,
    completion_tokens: int | None,
) -> None:
    """Says what a run will take: parameters, memory by part and phase, work and seconds a step, and the largest step that fits.

    Nothing is loaded: of a model only its configuration is read, so its weights need not be there. Seconds are worked out from a
    device's published peaks (this machine's are measured, in a second) at the shares of them that are printed.

    \b
    Examples:
      opd plan
      opd plan paper --model ~/models/Qwen3-VL-4B-Instruct --device H200
      opd plan lora --model ~/models/Qwen3-VL-2B-Instruct --device "M4 Max" --image 1920x1080
      opd plan my.toml --completion-tokens 200 --json
    """
    from opd import plan as planning
    from opd.plan import devices
    from opd_cli.progress import show
    from opd_cli.tables import planned

    found = resolve(recipe, {"model.path": model, "data.path": data}, overrides)
    resolved = found.recipe
    assumed = planning.Assumed(image, crop, text_tokens, completion_tokens)
    chosen = devices.device(device_name, backend)
    first = planning.plan(resolved, chosen, backend, assumed)
    if found.line:
        with show() as progress:
            progress.note(found.line)
    others = [one for one in devices.DEVICES.values() if one.name != chosen.name]
    plans = [first, *(planning.on(first, one) for one in others)]
    result = planning.report(plans, resolved.model.path)
    if as_json:
        say_json(result)
    else:
        planned(result)
