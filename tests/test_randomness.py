from __future__ import annotations

import numpy as np

from opd.randomness import Purpose, batch, generator, uniforms


def test_uniforms_are_keyed_by_place_alone():
    whole = uniforms(7, 3, [5, 9], completions=3, max_tokens=8)
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() < 1
    np.testing.assert_array_equal(uniforms(7, 3, [9], 2, 5)[0], whole[1, :2, :5])
    for other in (
        uniforms(8, 3, [5], 1, 8),
        uniforms(7, 4, [5], 1, 8),
        uniforms(7, 3, [6], 1, 8),
        uniforms(7, 3, [5], 2, 8)[:, 1:],
    ):
        assert not np.isin(other, whole[0, 0]).any()


def test_uniforms_are_uniform():
    drawn = uniforms(0, 1, range(50), 4, 100).ravel()
    counts = np.histogram(drawn, 10, (0, 1))[0]
    assert abs(drawn.mean() - 0.5) < 0.01
    assert counts.min() > 1850
    assert counts.max() < 2150


def test_known_values_so_that_runs_stay_reproducible():
    np.testing.assert_array_equal(batch(0, 1, 4, 10), [1, 4, 8, 7])
    np.testing.assert_allclose(
        uniforms(0, 1, [0], 1, 3)[0, 0], [0.8246245, 0.1360783, 0.5807111], rtol=1e-6
    )


def test_every_epoch_sees_every_example_once():
    seen = np.concatenate([batch(3, step, 4, 10) for step in range(1, 6)])
    assert sorted(seen[:10]) == list(range(10))
    assert sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])


def test_a_batch_may_be_larger_than_the_data():
    assert sorted(batch(0, 1, 6, 3)) == [0, 0, 1, 1, 2, 2]


def test_purposes_do_not_meet():
    assert generator(0, Purpose.ORDER).random() != generator(0, Purpose.BOOTSTRAP).random()
