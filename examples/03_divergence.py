# /// script
# requires-python = ">=3.11"
# dependencies = ["vision-opd", "matplotlib"]
# [tool.uv.sources]
# vision-opd = { path = ".." }
# ///
"""The divergence on three tokens: what alpha, the tail and the top k do.

python examples/03_divergence.py [PICTURE.png]
"""

import sys

import numpy as np

from opd import Objective
from opd.objective import evaluate

STUDENT = np.log([0.7, 0.2, 0.1])
TEACHER = np.log([0.3, 0.3, 0.4])


def divergence(student: np.ndarray, teacher: np.ndarray, **options: float | bool | None) -> float:
    """The divergence of one token whose policies have these logits, by `opd.objective`."""
    objective = Objective(**{"top_k": None, "tail": False, "ratio_clip": None, **options})
    found = evaluate(student[None], teacher[None], np.array([0]), np.zeros(1), objective)
    return float(found.divergence[0])


def kl(p: np.ndarray, q: np.ndarray) -> float:
    """KL(p || q) of probabilities."""
    return float((p * np.log(p / q)).sum())


p, q = np.exp(STUDENT), np.exp(TEACHER)
middle = (p + q) / 2
rest = np.array([p[0], 1 - p[0]]), np.array([q[0], 1 - q[0]])
rows = [
    ("forward KL, alpha 0", kl(q, p), divergence(STUDENT, TEACHER, alpha=0.0)),
    ("reverse KL, alpha 1", kl(p, q), divergence(STUDENT, TEACHER, alpha=1.0)),
    (
        "Jensen-Shannon, alpha 1/2",
        (kl(p, middle) + kl(q, middle)) / 2,
        divergence(STUDENT, TEACHER, alpha=0.5),
    ),
    (
        "reverse KL, top 1 and a tail",
        kl(*rest),
        divergence(STUDENT, TEACHER, alpha=1.0, top_k=1, tail=True),
    ),
    ("reverse KL, top 1 alone", 0.0, divergence(STUDENT, TEACHER, alpha=1.0, top_k=1)),
]
print(f"{'':30} {'by hand':>9} {'opd':>9}")
for name, by_hand, ours in rows:
    print(f"{name:30} {by_hand:9.5f} {ours:9.5f}")
    assert abs(by_hand - ours) < 1e-9

if sys.argv[1:]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shift = np.linspace(-4, 4, 81)
    for alpha in (0.0, 0.5, 1.0):
        curve = [divergence(STUDENT + np.array([x, 0, 0]), TEACHER, alpha=alpha) for x in shift]
        plt.plot(shift, curve, label=f"alpha = {alpha:g}")
    plt.xlabel("added to the student's logit of token 0")
    plt.ylabel("divergence, nats")
    plt.legend()
    plt.savefig(sys.argv[1], dpi=120)
    print(f"drawn: {sys.argv[1]}")
