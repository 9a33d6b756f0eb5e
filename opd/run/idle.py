"""Optimizer steps that were not taken: when they end a run, and advice for the message."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from opd.method.step import GRADIENT, NO_PROMPT, OUTPUTS, WEIGHTS

IDLE_STEPS = 5
"""A run ends after this many steps in a row that were not taken."""

ADVICE = {
    GRADIENT: "lower optimizer.learning_rate, or set model.dtype=float32",
    OUTPUTS: (
        "look for NaN in the model's weights, lower optimizer.learning_rate, or set"
        " model.dtype=float32"
    ),
    WEIGHTS: "give rows a weight above 0",
    NO_PROMPT: "mend or remove such rows, or raise rollout.prompts",
}
"""Advice by the reason why a step was not taken."""


def ended(step: int, idle: Sequence[str]) -> str:
    """The message for a run that ends at `step`; `idle` holds the reason of each step that was not
    taken, up to `step`."""
    (most, _), *others = Counter(idle).most_common()
    steps = f"step {step} was" if len(idle) == 1 else f"steps {step - len(idle) + 1} to {step} were"
    advice = f"; {ADVICE[most]}" if most in ADVICE else ""
    return f"{steps} not taken: {most}{', most often' if others else ''}{advice}"
