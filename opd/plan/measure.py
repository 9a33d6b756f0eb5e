"""Runs a planned step on this machine, with random weights, to compare it with the plan."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import numpy as np
from PIL import Image

from opd import registry
from opd.errors import RecipeError
from opd.memory import forget_peak_resident, peak_resident, return_freed_memory
from opd.method.rollout import Pair
from opd.method.step import Batch, Method, train_step
from opd.models.random_weights import write_random_model
from opd.plan import Plan
from opd.plan.memory import KEPT_FEATURES
from opd.plan.work import View, Work
from opd.prompts.encoder import PromptEncoder
from opd.types import Policy, Prompt

SCORES = ("teacher forward", "student forward", "student backward", "recomputation")
PARTS = {
    "rollout": ("rollout prefill", "rollout decode"),
    "accumulate": (*SCORES, "head and divergence"),
    "apply": ("optimizer", "teacher's average"),
}
"""Stages of a plan, by the part of a step whose seconds `train_step` measures."""


@dataclass(frozen=True)
class Measured:
    """Seconds of a step by part, and bytes at the peak, measured and planned."""

    seconds: Mapping[str, float]
    planned_seconds: Mapping[str, float]
    peak: int
    planned_peak: int


def measure(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Measured:
    """Runs the step with only as many prompts as run together, and multiplies the seconds of a part
    that the whole step repeats. `say` is called with lines about progress.

    Raises RecipeError if the planned step is larger than this machine's memory.
    """
    work, recipe, planned = plan.work, plan.recipe, plan.memory
    if planned.peak > plan.usable:
        most = f"{planned.peak / 1e9:.1f} GB are planned and {plan.usable / 1e9:.1f} GB usable"
        advice = "make the step smaller as the plan without --measure says"
        raise RecipeError(f"--measure: {most}; {advice}")
    return_freed_memory()
    forget_peak_resident()
    before = peak_resident() * registry.planner(plan.backend).machine().resident
    encoder = PromptEncoder(plan.options.path, **recipe.model.pixels())
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing {sum(map(prod, plan.shape.shapes.values())) / 1e6:,.0f} M random weights")
        write_random_model(Path(plan.options.path), Path(folder), plan.shape.shapes)
        options = replace(plan.options, path=Path(folder), adapter=None)
        backend = registry.load(plan.backend, options)
    forget_peak_resident()  # loading holds files that training does not

    # The question fills the tokens that a prompt has beside its image's.
    bare, one = (len(encoder.encode([], text)) for text in ("", " a" * 100))
    question = " a" * max(0, (work.student.text - bare) * 100 // max(1, one - bare))
    rng = np.random.default_rng(0)

    def prompt(view: View, policy: Policy) -> Prompt:
        pixels = rng.integers(0, 255, (*view.size[::-1], 3), np.uint8)
        return encoder.encode([Image.fromarray(pixels)], question, policy)

    # A second micro-batch adds its gradient to the first one's.
    prompts = min(work.prompts, max(work.sampled, 2 * work.together))
    pairs = tuple(
        Pair(number, "", 1.0, prompt(work.student, "student"), prompt(work.teacher, "teacher"))
        for number in range(prompts)
    )
    # No token ends a completion, so all have full length.
    rest = recipe.objective, recipe.teacher, recipe.optimizer, 0, 2, (), encoder.banned
    for step, tokens in ((1, min(8, work.tokens)), (2, work.tokens)):
        say("measuring" if step > 1 else "warming up")
        method = Method(recipe.rollout.model_copy(update={"max_tokens": tokens}), *rest)
        metrics = train_step(step, Batch(pairs), method, backend).metrics
    times = repeats(work, prompts)
    features = prompts * (work.student.visual + work.teacher.visual) * plan.shape.feature
    kept = planned.held.get(KEPT_FEATURES, 0)
    return Measured(
        {part: times[part] * metrics[f"seconds_{part}"] for part in PARTS},
        {part: sum(plan.seconds[stage] for stage in stages) for part, stages in PARTS.items()},
        backend.peak_memory - before,
        planned.peak - kept + min(kept, features),
    )


def repeats(work: Work, prompts: int) -> dict[str, float]:
    """How many times longer each part of a step takes than in a step of only `prompts` prompts, by
    the number of calls."""
    return {
        "rollout": ceil(work.prompts / work.sampled) / ceil(prompts / work.sampled),
        "accumulate": work.calls / ceil(prompts / work.together),
        "apply": 1.0,
    }
