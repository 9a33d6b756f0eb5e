"""Runs one micro-batch of a plan on this machine, with random weights, to compare with the plan."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil, prod
from pathlib import Path

import numpy as np
from PIL import Image

from opd import registry
from opd.backend import Prefill
from opd.errors import RecipeError
from opd.memory import forget_peak_resident, peak_resident
from opd.models.random_weights import write_random_model
from opd.plan import Plan
from opd.plan.memory import KEPT_FEATURES
from opd.prompts.encoder import PromptEncoder
from opd.types import Completion, Group, Policy, Prompt, Sampling, Update

VERBS = {
    "sample": ("rollout prefill", "rollout decode"),
    "accumulate": (
        *("teacher forward", "student forward", "student backward", "recomputation"),
        "head and divergence",
    ),
    "apply": ("optimizer",),
    "move_teacher": ("teacher's average",),
}
"""A plan's stages by the verb of a backend that runs them."""


@dataclass(frozen=True)
class Measured:
    """Seconds of a step by verb, one micro-batch times their number; bytes at the peak; and as
    planned."""

    seconds: Mapping[str, float]
    planned_seconds: Mapping[str, float]
    peak: int
    planned_peak: int


def measure(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Measured:
    """What a micro-batch of the plan takes here; `say` hears what is going on.

    Raises RecipeError where it is planned larger than this machine's memory.
    """
    work, rng, planned = plan.work, np.random.default_rng(0), plan.memory
    if planned.peak > plan.usable:
        most = f"{planned.peak / 1e9:.1f} GB are planned and {plan.usable / 1e9:.1f} GB usable"
        raise RecipeError(
            f"--measure: {most}; make the step smaller as the plan without --measure says"
        )
    machine = registry.planner(plan.backend).machine()
    forget_peak_resident()
    before = peak_resident()
    encoder = PromptEncoder(plan.options.path, **plan.recipe.model.pixels())
    question = _question(encoder, plan.text)
    with tempfile.TemporaryDirectory() as folder:
        say(f"writing {sum(map(prod, plan.shape.shapes.values())) / 1e6:,.0f} M random weights")
        write_random_model(Path(plan.options.path), Path(folder), plan.shape.shapes)
        options = replace(plan.options, path=Path(folder), adapter=None)
        backend = registry.load(plan.backend, options)
    forget_peak_resident()  # loading holds files that training does not

    def prompt(size: tuple[int, int], policy: Policy) -> Prompt:
        pixels = rng.integers(0, 255, (size[1], size[0], 3), np.uint8)
        return encoder.encode([Image.fromarray(pixels)], question, policy)

    def group() -> Group:
        tokens = rng.integers(0, 250, (work.completions, work.tokens)).astype(np.int32)
        likely = np.full(work.tokens, -8, np.float32)
        many = work.prompts * work.completions * work.tokens
        weights = (np.full(work.tokens, 1 / many, np.float32),) * work.completions
        rows = tuple(Completion(row, likely, False) for row in tokens)
        return Group(prompt(plan.image, "student"), prompt(plan.crop, "teacher"), rows, weights)

    groups = [group() for _ in range(max(work.together, work.sampled))]
    sampled, some = [one.student for one in groups[: work.sampled]], groups[: work.together]
    uniforms = rng.random((len(sampled), work.completions, work.tokens), dtype=np.float32)
    sampling = Sampling(plan.recipe.rollout.temperature, (), encoder.banned)
    objective = plan.recipe.objective.objective(sampling.temperature)
    held: list[Prefill | None] = []

    def sample() -> None:
        """Nothing ends a completion, so all are of full length."""
        held[:] = [backend.prefill(sampled) if work.sampled >= work.prompts else None]
        backend.sample(sampled, uniforms, sampling, prefill=held[0])

    def accumulate() -> None:
        shared = held.pop() if held else None
        if shared and len(some) < len(sampled):
            shared.release()
            shared = None
        backend.accumulate(some, objective, work.split, shared)

    verbs: dict[str, Callable[[], object]] = {
        "sample": sample,
        "accumulate": accumulate,
        "apply": lambda: backend.apply(Update(1e-6)),
        "move_teacher": lambda: backend.move_teacher(0.05),
    }
    # Once before the clock runs, to compile and to make moments; then beside a sum, as in a step.
    backend.sample(sampled, uniforms[:, :, : min(8, work.tokens)], sampling)
    for verb in ("accumulate", "apply", "move_teacher", *["accumulate"] * (work.calls > 1)):
        say(f"warming up: {verb}")
        verbs[verb]()
    times = {"sample": ceil(work.prompts / work.sampled), "accumulate": work.calls}
    seconds = {}
    for verb, run in verbs.items():
        say(f"measuring: {verb}")
        began = time.perf_counter()
        run()
        seconds[verb] = times.get(verb, 1) * (time.perf_counter() - began)
    features = len(groups) * (work.student.visual + work.teacher.visual) * plan.shape.feature
    kept = planned.held.get(KEPT_FEATURES, 0)
    return Measured(
        seconds,
        {verb: sum(plan.seconds[stage] for stage in stages) for verb, stages in VERBS.items()},
        backend.peak_memory - before * machine.resident,
        planned.peak - kept + min(kept, features),
    )


def _question(encoder: PromptEncoder, text: int) -> str:
    """A question with which a prompt without images has about `text` tokens."""
    bare, words = len(encoder.encode([], "")), max(0, text - len(encoder.encode([], "")))
    found = max(1, len(encoder.encode([], " a" * words)) - bare)
    return " a" * (words * words // max(found, words, 1))
