from __future__ import annotations

import pytest

from opd.method.schedules import (
    OptimizerOptions,
    TeacherOptions,
    learning_rate,
    optimizer_update,
    teacher_rate,
)


def rates(steps, **options):
    chosen = OptimizerOptions(learning_rate=1.0, **options)
    return [learning_rate(chosen, step, steps) for step in range(1, steps + 1)]


def test_warm_up_then_constant():
    assert rates(6, warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_ends_one_step_above_zero():
    assert rates(5, warmup_steps=1, schedule="linear") == pytest.approx([1.0, 1.0, 0.75, 0.5, 0.25])


def test_cosine_is_half_way_in_the_middle():
    found = rates(9, warmup_steps=0, schedule="cosine")
    assert found[0] == 1.0
    assert found == sorted(found, reverse=True)
    assert rates(8, warmup_steps=0, schedule="cosine")[4] == pytest.approx(0.5)
    assert 0 < found[-1] < 0.05


def test_a_run_shorter_than_its_warm_up():
    assert rates(3, warmup_steps=10, schedule="cosine") == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.05] * 6),
        ({"rate": 0.2, "every": 3}, [0, 0, 0.2, 0, 0, 0.2]),
        ({"rule": "frozen"}, [0] * 6),
        ({"rule": "sync", "every": 2}, [0, 1, 0, 1, 0, 1]),
        ({"rule": "live", "every": 2}, [1] * 6),
    ],
)
def test_teacher_rules(options, expected):
    assert [teacher_rate(TeacherOptions(**options), step) for step in range(1, 7)] == expected


def test_update_carries_every_option():
    options = OptimizerOptions(
        learning_rate=0.5,
        warmup_steps=2,
        betas=(0.8, 0.95),
        epsilon=1e-6,
        weight_decay=0.1,
        gradient_clip=0,
    )
    step = optimizer_update(options, 1, 10)
    assert (
        step.learning_rate,
        step.betas,
        step.epsilon,
        step.weight_decay,
        step.gradient_clip,
    ) == (0.25, (0.8, 0.95), 1e-6, 0.1, None)
