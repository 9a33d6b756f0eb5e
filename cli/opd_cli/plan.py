"""`opd plan`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from opd_cli.options import resolve, shared
from opd_cli.terminal import say_json

if TYPE_CHECKING:
    from opd.plan import Plan
    from opd.plan.measure import Measured


def _size(
    ctx: click.Context, parameter: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """Width and height in pixels of an option written 1024x768. Raises UsageError."""
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value)
    if match is None:
        raise click.UsageError(
            f"--{parameter.name} {value}: write it as WIDTHxHEIGHT in pixels, such as 1024x768", ctx
        )
    return int(match[1]), int(match[2])


@click.command()
@shared
@click.option(
    "--device",
    "device_name",
    default="this machine",
    show_default=True,
    help="M4 Max, RTX 4090, H200, A100 40GB, ..., or this machine.",
)
@click.option(
    "--memory",
    type=click.FloatRange(1),
    metavar="GB",
    help="Memory of the device, if it differs from the default.",
)
@click.option(
    "--image",
    callback=_size,
    metavar="WxH",
    help="Pixels of an image.  [default: the data's first, else 1024x768]",
)
@click.option(
    "--crop",
    callback=_size,
    metavar="WxH",
    help="Pixels of a crop.  [default: the data's first, else half of the image]",
)
@click.option(
    "--text-tokens",
    type=click.IntRange(1),
    help="Tokens of a prompt beside those of its image.  [default: 64]",
)
@click.option(
    "--completion-tokens",
    type=click.IntRange(1),
    help="Tokens of a completion.  [default: rollout.max_tokens]",
)
@click.option(
    "--measure",
    "measures",
    is_flag=True,
    help="Also run one micro-batch here, with random weights, and print it beside the plan.",
)
def plan(
    recipe: str | None,
    backend: str | None,
    model: str | None,
    data: str | None,
    overrides: tuple[str, ...],
    as_json: bool,
    device_name: str,
    memory: float | None,
    image: tuple[int, int] | None,
    crop: tuple[int, int] | None,
    text_tokens: int | None,
    completion_tokens: int | None,
    measures: bool,
) -> None:
    """Estimates a run: parameters, memory by part and phase, operations, seconds and hours, and the
    largest step that fits.

    Only the model's configuration is read, so the weights need not be downloaded. Seconds are
    computed from the published peaks of a device, or from those of this machine, at the shares of
    the peaks that are printed. --measure also runs a micro-batch.

    \b
    Examples:
      opd plan
      opd plan paper --model ~/models/Qwen3-VL-4B-Instruct --device H200
      opd plan lora --model ~/models/Qwen3-VL-2B-Instruct --device "M4 Max" --memory 64
      opd plan my.toml --completion-tokens 200 --json
      opd plan my.toml --measure
    """
    from opd import plan as planning
    from opd import registry
    from opd.plan import devices
    from opd_cli.progress import show
    from opd_cli.tables import planned

    if measures and device_name != devices.HERE:
        raise click.UsageError(
            f"--measure runs on this machine, not on a {device_name}; leave out --device"
        )
    resolved = resolve(recipe, {"model.path": model, "data.path": data}, overrides)
    assumed = planning.Assumed(image, crop, text_tokens, completion_tokens)
    name = registry.resolve(backend or "auto") if device_name == devices.HERE else backend
    chosen = devices.device(device_name, lambda: registry.planner(str(name)), memory)
    first = planning.plan(resolved.recipe, chosen, name, assumed)
    measured = None
    with show() as progress:
        if resolved.line:
            progress.note(resolved.line)
        if measures:
            from opd.plan.measure import measure

            measured = measure(first, progress.note)
    plans = planning.everywhere(first, list(devices.DEVICES.values()))
    result = report(plans, resolved.recipe.model.path, measured)
    if as_json:
        say_json(result)
    else:
        planned(result)


def report(plans: Sequence[Plan], model: str, measured: Measured | None = None) -> dict[str, Any]:
    """The first plan, the totals of all plans, and the measurement as one JSON object, in bytes,
    operations and seconds."""
    from opd.plan.memory import KEPT_FEATURES, ROUGH

    first = plans[0]
    memory, seconds, work = first.memory, first.seconds, first.work
    at_once = work.split or work.completions
    trained, shorter = first.shape.trained(first.options), first.shorter()
    return {
        "model": model,
        "device": asdict(first.device),
        "backend": first.backend,
        "dtype": first.options.dtype,
        "notes": list(first.notes),
        "assumed": {
            "image": list(work.student.size),
            "crop": list(work.teacher.size),
            "prompt_tokens": work.student.tokens,
            "crop_prompt_tokens": work.teacher.tokens,
            "text_tokens": work.student.text,
            "completion_tokens": work.tokens,
            "prompts": work.prompts,
            "completions": work.completions,
            "matmul_share": first.device.matmul_share,
            "bandwidth_share": first.device.bandwidth_share,
        },
        "parameters": {
            part: {"all": count, "trained": trained[part]}
            for part, count in first.shape.parameters.items()
        },
        "memory": {
            **asdict(memory),
            "rough": list(ROUGH),
            "peak": memory.peak,
            "usable": int(first.usable),
            "kept_features_bound": first.step.features if KEPT_FEATURES in memory.held else 0,
        },
        "microbatch": {
            "groups": work.together,
            "count": work.calls,
            "completions": at_once,
            "tokens": work.together * (work.longest + at_once * work.tokens),
            "largest": first.largest,
        },
        "sampling": {"groups": work.sampled, "largest": first.largest_sample},
        "smaller": {} if first.largest and first.largest_sample else first.smaller(),
        "stages": {
            name: {**stage._asdict(), "seconds": seconds[name]}
            for name, stage in first.stages.items()
        },
        "seconds": sum(seconds.values()),
        "steps": first.recipe.run.steps,
        "hours": first.hours,
        "shorter": {"change": shorter[0], "hours": shorter[1]} if shorter else None,
        "measured": asdict(measured) if measured else None,
        "devices": [
            {
                **asdict(plan.device),
                "seconds": sum(plan.seconds.values()),
                "hours": plan.hours,
                "peak": plan.memory.peak,
                "fits": plan.memory.peak <= plan.usable,
            }
            for plan in plans
        ],
    }
