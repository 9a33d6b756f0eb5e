# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd[cuda]"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""Vision-OPD by hand: ten steps of the method, with the verbs of a backend and nothing around them.

python examples/01_by_hand.py
"""

import numpy as np

import opd
from opd.method import rollout, schedules
from opd.method.rollout import Pair
from opd.randomness import uniforms
from opd.types import Sampling
from opd.views import usable

STEPS, PROMPTS, COMPLETIONS = 10, 8, 4

recipe = opd.recipe("tiny")
model = opd.open_model("tiny")
backend, encoder = model.backend, model.encoder
examples = opd.read_data("tiny", count=STEPS * PROMPTS)
held_out = opd.read_data("tiny", count=50)
objective = recipe.objective.objective(recipe.rollout.temperature)
before = opd.measure_gap(model, held_out)

for step in range(1, STEPS + 1):
    # Two views of each example: the student sees the full image, the teacher the evidence.
    rows = range((step - 1) * PROMPTS, step * PROMPTS)
    pairs = [
        Pair(place, examples[row].id, 1.0, *usable.encode(encoder, examples[row], recipe.view))
        for place, row in enumerate(rows)
    ]

    # The student samples on the full image, by the core's random numbers.
    drawn = uniforms(0, step, range(PROMPTS), COMPLETIONS, recipe.rollout.max_tokens)
    sampling = Sampling(recipe.rollout.temperature, encoder.stop, encoder.banned)
    sampled = backend.sample([pair.student for pair in pairs], drawn, sampling)
    kept = rollout.drop_unusable(pairs, sampled, encoder.banned)

    # Every token weighs the same: 1 / tokens of the whole step.
    tokens = sum(len(one) for group in kept.completions for one in group)
    groups = rollout.groups(kept, tokens)

    # Both policies read the completions; the divergence is differentiated through the student.
    statistics = backend.accumulate(groups, objective)
    divergence = np.concatenate([one.divergence for group in statistics for one in group])

    # The student steps, and the teacher follows.
    result = backend.apply(schedules.optimizer_update(recipe.optimizer, step, STEPS))
    backend.move_teacher(schedules.teacher_rate(recipe.teacher, step))
    print(f"step {step}: divergence {divergence.mean():.4f}, gradient {result.gradient_norm:.3f}")

after = opd.measure_gap(model, held_out)
print(f"full image: {before.full_accuracy:.0%} before, {after.full_accuracy:.0%} after")
print(f"gap: {before.gap:.0%} before, {after.gap:.0%} after")
