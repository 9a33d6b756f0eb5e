"""Bytes that elementwise work moves in each stage of a step, between its matrix products; neither backend fuses it.

Operations are counted in the backends' own files, each with what it reads and writes.
"""

from __future__ import annotations

from dataclasses import replace

from opd.plan.activations import FLOAT, Activations, Setting, activations, delta_bytes, delta_held, scores_again
from opd.plan.shape import Delta, Shape, Tune
from opd.plan.work import View, Work, reused

FORWARD, BACKWARD = 3, 5
"""Passes over every array that a backward needs: written and read twice; read, and its gradient written, added to and read twice."""

HEAD, DRAW = 20, 10
"""Passes over the logits of a token that is trained on (of both policies), and of one that is drawn."""

OPTIMIZER = {False: 23, True: 37}
"""Passes over the trained parameters in `optimizer.py` of torch, and of MLX: norm, clip, moments, and the step itself."""

AVERAGE = {False: 3, True: 8}
"""The same where the teacher moves."""


def passed(shape: Shape, tune: Tune, work: Work, setting: Setting, again: bool) -> dict[str, float]:
    """Bytes by stage."""
    seen = reused(shape, tune, work, setting.features)
    student, teacher = (_kept(shape, work, setting, view) for view in (work.student, work.teacher))
    rows, trained = work.completions * work.tokens, sum(tune.trained(shape).values())
    logits = float(FLOAT * shape.vocabulary * rows)
    text = student.prompts + student.completions
    differentiated = text + student.vision * tune.sees
    each = {
        "rollout prefill": FORWARD * (student.prompts + student.vision),
        "rollout decode": FORWARD * student.completions + DRAW * logits,
        "teacher forward": FORWARD * teacher.total,
        "student forward": FORWARD * (text + student.vision * (not seen)),
        "student backward": BACKWARD * differentiated,
        "recomputation": FORWARD * differentiated * again,
        "head and divergence": HEAD * logits,
    }
    found = {name: float(work.prompts * size) for name, size in each.items()}
    found["optimizer"] = float(OPTIMIZER[setting.mlx] * FLOAT * trained)
    found["teacher's average"] = float(AVERAGE[setting.mlx] * FLOAT * trained)
    return found


def _kept(shape: Shape, work: Work, setting: Setting, view: View) -> Activations:
    """What a backward of one whole group would need, whatever is trained."""
    one, tune = replace(work, student=view, prompts=1), Tune()
    found = activations(shape, tune, one.limited(1), setting, again=False)
    # Long rows of a delta net are not held whole, nor are all scores, and computed all the same.
    beside = sum(
        count * (delta_bytes(tune, layer, view.before, setting) - delta_held(tune, layer, view.before, setting))
        for layer, count in shape.kinds.items()
        if isinstance(layer, Delta)
    )
    scores = scores_again(shape, one, setting)
    return replace(
        found, vision=found.vision + scores[0], prompts=found.prompts + beside + scores[1], completions=found.completions + scores[2]
    )
