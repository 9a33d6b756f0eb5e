"""The gap's numbers: accuracies, the share closed, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest

from opd.measure.gap import Answered, accuracies, gap_closed, greedy_answers
from opd.testing.toy import ToyBackend, ToyEncoder
from opd.types import Sampling
from opd.views import usable
from opd.views.view import ViewOptions
from tests.conftest import coloured


def answered(full: str, crop: str) -> list[Answered]:
    """One example a letter: r is right, w is wrong, - has no answer."""
    texts = {"r": "7", "w": "8", "-": "9"}
    rights = {"r": True, "w": False, "-": None}
    return [
        Answered(
            str(index), None if a == "-" else "7", texts[a], texts[b], rights[a], rights[b], index
        )
        for index, (a, b) in enumerate(zip(full, crop, strict=True))
    ]


def test_accuracies_agreement_and_gap():
    found = accuracies(answered("rwwr--", "rrwr--"))
    assert (found["rows"], found["full_accuracy"], found["crop_accuracy"], found["gap"]) == (
        6,
        0.5,
        0.75,
        0.25,
    )
    assert found["agreement"] == pytest.approx(5 / 6)


def test_rows_without_answers_have_agreement_alone():
    found = accuracies(answered("--", "--"))
    assert found.keys() == {"rows", "rows_with_answer", "agreement", "agreement_interval"}


def test_share_closed_is_of_the_gap_before():
    before, after = answered("rrwwww" * 10, "rrrrww" * 10), answered("rrrwww" * 10, "rwwwww" * 10)
    # losing crop accuracy is no success
    assert gap_closed(before, after)["gap_closed"] == pytest.approx(0.5)
    assert gap_closed(before, answered("wwwwww" * 10, "rrrrrr" * 10))[
        "gap_closed"
    ] == pytest.approx(-1.0)
    assert gap_closed(answered("rr", "rr"), answered("rr", "rr")) == {}
    assert gap_closed(answered("--", "--"), answered("--", "--")) == {}


def test_without_a_certain_gap_no_share_is_closed():
    """One row more on the crop is no gap, and what is divided by it may be anything."""
    before = answered("r" * 99 + "w", "r" * 100)
    assert accuracies(before)["gap"] > 0
    assert gap_closed(before, answered("r" * 60 + "w" * 40, "r" * 100)) == {}


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(0, 3, 0.0, 0.561497), (4, 4, 0.510109, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_intervals_of_shares_are_wilsons(right, rows, low, high):
    """Source of the last: Newcombe 1998, table I (81 of 263: 0.2553 to 0.3662)."""
    found = accuracies(answered("r" * right + "w" * (rows - right), "r" * rows))
    assert found["full_accuracy_interval"] == pytest.approx([low, high], abs=5e-5)


def test_intervals_are_paired_over_examples():
    rng = np.random.default_rng(0)
    full = "".join(rng.choice(["r", "w"], size=400))
    same = accuracies(answered(full, full))
    assert same["gap_interval"] == [0.0, 0.0]  # every resample has the same rows on both sides
    low, high = same["full_accuracy_interval"]
    assert high - low == pytest.approx(2 * 1.96 * np.sqrt(0.25 / 400), rel=0.1)


def test_a_bootstrap_interval_leaves_out_a_fortieth_at_each_end():
    """For many rows the ends lie 1.96 standard errors from the value."""
    found = accuracies(answered("rw" * 200, "r" * 400))
    middle, half = found["gap"], 1.96 * np.sqrt(0.25 / 400)
    assert found["gap_interval"] == pytest.approx([middle - half, middle + half], abs=0.1 * half)


def test_intervals_cover_the_truth_19_times_of_20():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        full = "".join(np.where(rng.random(150) < 0.6, "r", "w"))
        low, high = accuracies(answered(full, "r" * 150))["full_accuracy_interval"]
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 198


def test_examples_are_encoded_a_slice_at_a_time():
    """Full images and crops together; and in any slices the answers are the same."""
    given = ToyEncoder(), coloured(5), ViewOptions(), 4, 10**6
    whole = greedy_answers(ToyBackend(), *given)
    asked = []

    class Counting(ToyBackend):
        def sample(self, prompts, uniforms, sampling, policy="student", prefill=None):
            asked.append(len(prompts))
            return super().sample(prompts, uniforms, sampling, policy, prefill)

    assert greedy_answers(Counting(), *given, slice_size=2) == whole
    assert asked == [4, 4, 2]


def test_answers_are_greedy_on_the_full_image_and_on_the_crop():
    """Also of a control, whose teacher does not see the crop in training."""
    backend, encoder, examples = ToyBackend(), ToyEncoder(), coloured(5)
    heard = []
    found = greedy_answers(
        backend,
        encoder,
        examples,
        ViewOptions(kind="full", margin=0),
        4,
        10**6,
        progress=heard.append,
    )
    assert sum(heard) == 10
    assert [one.id for one in found] == [example.id for example in examples]
    assert any(one.full != one.crop for one in found)
    encoders = {
        "full": usable.encode_student,
        "crop": lambda *given: usable.encode_teacher(*given, ViewOptions(margin=0)),
    }
    for view, encode in encoders.items():
        prompts = [encode(encoder, example) for example in examples]
        alone = backend.sample(
            prompts, np.zeros((5, 1, 4), np.float32), Sampling(0.0, encoder.stop, encoder.banned)
        )
        assert [getattr(one, view) for one in found] == [
            encoder.decode(group[0].tokens) for group in alone
        ]
    again = greedy_answers(backend, encoder, examples, ViewOptions(kind="crop", margin=0), 4, 1)
    assert found == again
    assert all(one.full_right is (one.full == "abc") for one in found)
