from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd.method import microbatch
from opd.method.microbatch import completions_at_once, largest_count, microbatches, microbatches_of
from opd.method.rollout import (
    Pair,
    RolloutOptions,
    cut_at_stop,
    drop_unusable,
    groups,
    padding_group,
    prefill_of,
    sample,
)
from opd.objective import Objective
from opd.testing.toy import Together, ToyBackend, ToyEncoder
from opd.types import Completion, Sampling
from opd.views import usable
from opd.views.view import ViewOptions
from tests.conftest import coloured


def completion(*tokens, finished=True):
    return Completion(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32), finished)


def pairs(count=3, weight=1.0):
    encoder, view = ToyEncoder(), ViewOptions()
    return [
        Pair(
            index,
            one.id,
            weight,
            usable.encode_student(encoder, one),
            usable.encode_teacher(encoder, one, view),
        )
        for index, one in enumerate(coloured(count))
    ]


@given(
    st.lists(st.tuples(st.integers(1, 500), st.integers(1, 80)), max_size=30),
    st.integers(1, 8),
    st.integers(1, 3000),
)
def test_micro_batches_hold_every_group_once_within_the_budget(costs, completions, budget):
    parts = microbatches(costs, completions, budget)
    assert sorted(index for part in parts for index in part) == list(range(len(costs)))
    for part in parts:
        padded = max(costs[index][0] for index in part) + completions * max(
            costs[index][1] for index in part
        )
        assert len(part) == 1 or padded * len(part) <= budget


def test_micro_batches_put_like_lengths_together():
    assert microbatches([(100, 4), (10, 4), (98, 4), (12, 4)], 1, 210) == [[0, 2], [3, 1]]


def test_the_longest_completion_of_a_micro_batch_counts_for_all_in_it():
    assert microbatches([(10, 1), (9, 50), (8, 1)], 1, 130) == [[0, 1], [2]]


def test_rows_are_cut_behind_their_first_stop_token():
    tokens = np.array([[5, 0, 7], [1, 2, 3], [0, 0, 9], [4, 4, 8]])
    logprobs = -np.arange(12, dtype=np.float32).reshape(4, 3)
    found = cut_at_stop(tokens, logprobs, 2, stop=(0, 8))
    assert [[one.tokens.tolist() for one in row] for row in found] == [
        [[5, 0], [1, 2, 3]],
        [[0], [4, 4, 8]],
    ]
    assert [[one.logprobs.tolist() for one in row] for row in found] == [
        [[0, -1], [-3, -4, -5]],
        [[-6], [-9, -10, -11]],
    ]
    assert [[one.finished for one in row] for row in found] == [[True, False], [True, True]]
    assert {len(one) for row in cut_at_stop(tokens, logprobs, 4, stop=()) for one in row} == {3}


def test_what_is_dropped_is_counted():
    sampled = [
        [completion(5, 0), completion(1, 0)],
        [completion()],
        [completion(7), completion(8, 0)],
    ]
    rollout = drop_unusable(pairs(), sampled, banned=(1,))
    assert rollout.dropped == 2
    assert [pair.place for pair in rollout.pairs] == [0, 2]
    assert [[one.tokens.tolist() for one in group] for group in rollout.completions] == [
        [[5, 0]],
        [[7], [8, 0]],
    ]


def test_weights_are_the_mean_over_all_tokens_of_the_step():
    rollout = drop_unusable(
        pairs(2, weight=0.5), [[completion(5, 0), completion(6)], [completion(7, 8, 0)]], banned=()
    )
    made = groups(rollout, step_tokens=12)  # six tokens here, six on another process
    assert [[weights.tolist() for weights in group.weights] for group in made] == [
        [[np.float32(0.5 / 12)] * 2, [np.float32(0.5 / 12)]],
        [[np.float32(0.5 / 12)] * 3],
    ]
    assert sorted(chain(*microbatches_of(made, 10**6))) == [0, 1]


def test_sampling_does_not_depend_on_the_cut():
    backend, prompts = ToyBackend(), [pair.student for pair in pairs(5)]
    uniforms = np.random.default_rng(0).random((5, 3, 6), np.float32)
    seen = []
    whole = sample(backend, prompts, uniforms, Sampling(1.0, (0,), (1,)), 10**6)
    apart = sample(backend, prompts, uniforms, Sampling(1.0, (0,), (1,)), 1, progress=seen.append)
    assert seen == [1] * 5
    for ours, theirs in zip(whole, apart, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a.tokens, b.tokens)


class Watched(ToyBackend):
    """Writes down which prompts run once for both, in the order of their groups."""

    def __init__(self):
        super().__init__()
        self.shared = []

    def accumulate(self, groups, objective, split=0, prefill=None):
        self.shared.append(prefill and prefill.order)
        return super().accumulate(groups, objective, split, prefill)


def rolled_out(questions, budget=10**6, together=10**6):
    """A backend, pairs whose questions have these lengths, their prefill, and their groups."""
    backend, encoder = Watched(), ToyEncoder()
    some = [
        replace(one, question="q" * length)
        for one, length in zip(coloured(len(questions)), questions, strict=True)
    ]
    made = [
        Pair(
            place,
            one.id,
            1.0,
            usable.encode_student(encoder, one),
            usable.encode_teacher(encoder, one, ViewOptions()),
        )
        for place, one in enumerate(some)
    ]
    options = RolloutOptions(
        completions=2, max_tokens=4, sample_tokens=budget, microbatch_tokens=together
    )
    prefill = prefill_of(backend, [pair.student for pair in made], options)
    uniforms = np.random.default_rng(1).random((len(made), 2, 4), np.float32)
    sampled = sample(
        backend,
        [pair.student for pair in made],
        uniforms,
        Sampling(1.0, (0,), ()),
        budget,
        prefill=prefill,
    )
    return backend, prefill, groups(drop_unusable(made, sampled, ()), 10)


def test_prompts_run_once_for_the_rollout_and_the_gradient():
    backend, prefill, made = rolled_out([2, 9, 5])
    longest = np.argsort([-len(one) for one in prefill.prompts], kind="stable")
    assert list(longest) == [0, 1, 2]  # sampled longest first
    statistics = microbatch.accumulate(backend, made, Objective(), 10**6, None, prefill)
    assert [sorted(order) for order in backend.shared] == [[0, 1, 2]]
    alone = ToyBackend()
    wanted = alone.accumulate(made, Objective())
    for name, value in alone.tensors("gradient").items():
        np.testing.assert_allclose(backend.tensors("gradient")[name], value, rtol=1e-6, atol=1e-9)
    for ours, theirs in zip(chain(*statistics), chain(*wanted), strict=True):
        np.testing.assert_array_equal(ours.divergence, theirs.divergence)


@pytest.mark.parametrize(
    "change", ["a group fell out", "two micro-batches", "twice the same prompt", "no group"]
)
def test_a_prefill_that_does_not_serve_is_released_before_anything_runs(change):
    backend, prefill, made = rolled_out([2, 9, 5])
    some = {
        "a group fell out": made[1:],
        "twice the same prompt": [*made[1:], made[1]],
        "no group": [],
    }.get(change, made)
    microbatch.accumulate(
        backend, some, Objective(), 1 if change == "two micro-batches" else 10**6, None, prefill
    )
    assert set(backend.shared) <= {None}
    with pytest.raises(ValueError, match="taken or released"):
        backend.sample(prefill.prompts, np.zeros((3, 1, 1)), Sampling(), prefill=prefill)


def test_a_process_that_runs_its_prompts_together_joins_the_calls_of_one_that_does_not():
    """Two prompts fit one call, three do not: the first process samples one of its prompts
    again."""
    found = {}

    def run(backend):
        prompts = [pair.student for pair in pairs(2 + backend.rank)]
        longest = max(map(len, prompts)) + 2 * 4
        options = RolloutOptions(completions=2, max_tokens=4, sample_tokens=2 * longest)
        prefill = prefill_of(backend, prompts, options)
        uniforms = np.random.default_rng(1).random((len(prompts), 2, 4), np.float32)
        sampled = sample(
            backend,
            prompts,
            uniforms,
            Sampling(1.0, (0,), ()),
            options.sample_tokens,
            prefill=prefill,
        )
        found[backend.rank] = (prefill is not None, len(sampled))

    Together.start(2, run)
    assert found == {0: (True, 2), 1: (False, 3)}


def test_prompts_that_are_sampled_or_differentiated_apart_are_not_held():
    assert rolled_out([2, 9, 5], budget=1)[1] is None
    assert rolled_out([2, 9, 5], together=20)[1] is None
    assert rolled_out([2, 9, 5], together=3 * (10 + 2))[1] is not None


def test_the_most_of_all_processes():
    found = {}

    def run(backend):
        found[backend.rank] = largest_count(backend, [3, 7, 5][backend.rank])

    Together.start(3, run)
    assert found == {0: 7, 1: 7, 2: 7}


def test_a_spare_group_adds_nothing():
    backend = ToyBackend()
    backend.accumulate([padding_group(pairs(1)[0], (0,))], Objective())
    assert all((value == 0).all() for value in backend.tensors("gradient").values())


def test_a_group_above_the_budget_is_split():
    short, long = completion(*range(3)), completion(*range(10))
    one, other = pairs(2)
    prompt = len(one.student)
    group = groups(drop_unusable([one], [[long, short, long, short]], banned=()), 26)
    assert completions_at_once(group, prompt + 40) == 0
    assert completions_at_once(group, prompt + 39) == 3
    assert completions_at_once(group, prompt + 20) == 2
    assert completions_at_once(group, 1) == 1
    assert (
        completions_at_once([*group, *groups(drop_unusable([other], [[long]], banned=()), 10)], 1)
        == 0
    )
