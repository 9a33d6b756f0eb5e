"""Learning rate and teacher rate as pure functions of the step (1, 2, ..., steps)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from opd.options import Options
from opd.types import Update


class OptimizerOptions(Options):
    """AdamW and its learning rate."""

    learning_rate: float = Field(2e-6, gt=0, le=1, description="Peak learning rate.")
    schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="What follows the warm-up: constant, or down to 0."
    )
    warmup_steps: int = Field(
        10, ge=0, description="Steps in which the learning rate rises linearly to its peak."
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the first and second moment."
    )
    epsilon: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    weight_decay: float = Field(
        0.01, ge=0, description="Decoupled weight decay on every trained parameter."
    )
    gradient_clip: float = Field(
        1.0, ge=0, description="Bound of the global gradient norm; 0 turns clipping off."
    )


class TeacherOptions(Options):
    """How the teacher follows the student."""

    rule: Literal["ema", "frozen", "sync", "live"] = Field(
        "ema",
        description=(
            "ema: moves by `rate`; frozen: never; sync: copied every `every` steps; live: is the"
            " student (collapses; for study)."
        ),
    )
    rate: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of the way to the student at each move of the ema rule.",
    )
    every: int = Field(1, ge=1, description="The teacher moves at every so many steps.")


def learning_rate(options: OptimizerOptions, step: int, steps: int) -> float:
    """Learning rate of a step in 1..`steps`: linear warm-up from peak / warmup_steps, then
    constant, or decay by a cosine or a line to nearly 0."""
    if step <= options.warmup_steps:
        return options.learning_rate * step / options.warmup_steps
    if options.schedule == "constant":
        return options.learning_rate
    left = 1.0 - (step - options.warmup_steps - 1) / max(1, steps - options.warmup_steps)
    factor = left if options.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
    return options.learning_rate * max(0.0, factor)


def teacher_rate(options: TeacherOptions, step: int) -> float:
    """The rate in 0..1 of theta_T += rate * (theta_S - theta_T) after a step; every teacher rule is
    a choice of this number."""
    if options.rule == "frozen" or (options.rule != "live" and step % options.every):
        return 0.0
    return options.rate if options.rule == "ema" else 1.0


def optimizer_update(options: OptimizerOptions, step: int, steps: int) -> Update:
    """What the optimizer does at a step."""
    return Update(
        learning_rate=learning_rate(options, step, steps),
        betas=options.betas,
        epsilon=options.epsilon,
        weight_decay=options.weight_decay,
        gradient_clip=options.gradient_clip or None,
    )
