"""What the MLX backend runs a part at a time gives what it gives at once: completions that are
differentiated, prompts that are sampled."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

mx = pytest.importorskip("mlx.core")
pytest.importorskip("torch")

from opd.objective import Objective
from opd.types import Completion, Group, ModelOptions, Sampling
from opd_mlx.kernels import backward, recorder
from opd_mlx.layers.attention import buffer_length
from tests.support import random_models
from tests.support.cases import watch
from tests.support.mlx_cases import MAC, make_case, opened, relative_error

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=list(random_models.FAMILIES))
def case(request, tmp_path_factory):
    """Completions of unequal lengths and numbers, some of them empty, and a group that has nothing
    else."""
    root = tmp_path_factory.mktemp(request.param)
    folder = random_models.FAMILIES[request.param](root / "model")
    found = make_case(root, random_models.raise_norms(folder))
    found.kind, found.loaded = request.param, opened(ModelOptions(folder), found.state, **MAC)
    empty = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), False)
    nothing = np.zeros(0, np.float32)

    def with_empty(group: Group, place: int) -> Group:
        completions, weights = list(group.completions), list(group.weights)
        completions.insert(place, empty)
        weights.insert(place, nothing)
        return replace(group, completions=tuple(completions), weights=tuple(weights))

    first, second, third, *_ = found.groups
    none = Group(first.student, first.teacher, (empty, empty), (nothing, nothing))
    found.groups = [with_empty(first, 1), none, second, with_empty(third, 0)]
    return found


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose activations are much more than its weights' gradient, and a group of which n
    completions can be taken."""
    root = tmp_path_factory.mktemp("wide")
    return make_case(root, random_models.qwen3_vl(root / "model")), np.random.default_rng(0)


@pytest.mark.parametrize("again", [False, True])
def test_memory_is_that_of_one_part(wide, again):
    case, rng = wide
    loaded, length = case.loaded(), 96

    def peak(n: int, split: int) -> int:
        completions = tuple(
            Completion(
                rng.integers(0, 250, length).astype(np.int32),
                np.full(length, -5, np.float32),
                False,
            )
            for _ in range(n)
        )
        weights = tuple(np.full(length, 0.01, np.float32) for _ in range(n))
        backend = loaded.backend(checkpoint_above=0 if again else 2**60)
        gc.collect()  # else what an earlier test left is freed meanwhile, and the peak looks lower
        mx.synchronize()  # a stream lets go of arrays in a thread of its own
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        backend.accumulate(
            [Group(case.groups[0].student, case.groups[0].teacher, completions, weights)],
            JSD,
            split,
        )
        return int(mx.get_peak_memory()) - before

    whole, four, one = peak(16, 0), peak(16, 4), peak(16, 1)
    assert one < 0.6 * four < 0.5 * whole
    # The teacher's hidden states, results and targets of more completions: a row and some numbers a
    # token.
    hidden = loaded.model.config["text_config"]["hidden_size"]
    assert peak(64, 1) - one < 48 * length * (4 * hidden + 100)


def test_a_view_that_mlx_does_not_see(monkeypatch):
    """Where what is written through NumPy does not arrive, there is no gradient rather than a wrong
    one."""
    one = backward.Backward(lambda x: [x * x], [mx.array([3.0, 4.0])])
    mx.eval(one.outputs)
    assert one.start([mx.array([1.0, 10.0])])[0].tolist() == [6.0, 80.0]
    other = backward.Backward(lambda x: [x * x], [mx.array([3.0, 4.0])])
    monkeypatch.setattr(backward.np, "copyto", lambda *arguments: None)
    with pytest.raises(RuntimeError, match="no gradient"):
        other.start([mx.array([1.0, 10.0])])


@pytest.fixture(scope="module")
def ending(case):
    """Prompts, uniforms and a stop token with which completions end at different steps, and some
    never do."""
    prompts = [group.student for group in case.groups]
    uniforms = np.random.default_rng(3).random((4, 5, 40), dtype=np.float32)
    free = case.loaded.backend().sample(prompts, uniforms, Sampling(3.0))
    tokens = np.array([one.tokens for row in free for one in row])

    def stops(rest: int) -> tuple[int, ...]:
        return tuple(range(rest, int(tokens.max()) + 1, 9))

    def unequal(rest: int) -> int:
        stopped = np.isin(tokens, stops(rest))
        return len(np.unique(stopped.argmax(1))) * int(stopped.any(1).sum())

    return prompts, uniforms, Sampling(3.0, stops(max(range(9), key=unequal)))


def same(case, ours, theirs):
    for row, other in zip(ours, theirs, strict=True):
        for one, wanted in zip(row, other, strict=True):
            np.testing.assert_array_equal(one.tokens, wanted.tokens)
            np.testing.assert_allclose(
                one.logprobs,
                wanted.logprobs,
                rtol=2e-6,
                atol=1e-3 if case.kind == "qwen3_5" else 4e-6,
            )
            assert one.finished == wanted.finished


def longest(completions):
    return max(len(one) for row in completions for one in row)


def test_what_has_ended_leaves_the_batch(case, ending, monkeypatch):
    seen = []
    watch(monkeypatch, "opd_mlx.sampling.decode", lambda _, batch, *__: seen.append(batch.shape))
    ours = case.loaded.backend().sample(*ending)
    shapes = list(seen)
    seen.clear()
    same(case, ours, case.loaded.backend(compact_below=0.0).sample(*ending))
    assert set(seen) == {(4, 5, 1)}
    assert len(seen) == len(shapes)
    lengths = np.array([[len(one) for one in row] for row in ours])
    assert len(np.unique(lengths)) > 3
    rows = [count * n for count, n, _ in shapes]
    for step, size in enumerate(rows):
        alive = lengths > step
        assert alive.sum() <= size
        assert alive.any(1).sum() * alive.sum(1).max() > 0.75 * size
    assert {count for count, _, _ in shapes} != {4} or {n for _, n, _ in shapes} != {5}


@pytest.mark.parametrize("ahead", [1, 3])
def test_steps_launched_ahead(case, ending, monkeypatch, ahead):
    """Where the host looks at a token when others are already under way, rows that have ended run
    on, and nothing changes."""
    whole = case.loaded.backend().sample(*ending)
    steps = []
    watch(monkeypatch, "opd_mlx.sampling.draw", lambda *_: steps.append(1))
    same(case, case.loaded.backend(steps_ahead=ahead).sample(*ending), whole)
    assert len(steps) == min(40, longest(whole) + ahead)
    steps.clear()
    everything = tuple(range(1000))
    ended = case.loaded.backend(steps_ahead=ahead).sample(*ending[:2], Sampling(1.0, everything))
    assert {len(one) for row in ended for one in row} == {1}
    assert len(steps) == 1 + ahead


def test_what_a_gpu_compiles(case, ending, monkeypatch):
    """A step of a shape that has been before is the one that was built then: it reads whole
    buffers, and masks what stands behind its row.

    A CPU would have kernels compiled for it, which one family shows.
    """
    whole = case.loaded.backend().sample(*ending)
    # What ends leaves at another time one step ahead, where sums are of other lengths.
    gpu = case.loaded.backend(steps_ahead=1, compiles=True, cache_tokens=4)
    built, shapes = [], []
    decoded = lambda _, batch, __, ___, step: built.append((batch.shape, step.count))
    watch(monkeypatch, "opd_mlx.sampling.decode", decoded)
    run = "opd_mlx.kernels.recorder.Recorder.run"
    watch(monkeypatch, run, lambda _, shape, __: shapes.append(shape))
    kernels = case.kind == "qwen3_5" and shutil.which("g++")
    if not kernels:
        mx.disable_compile()
    try:
        same(case, gpu.sample(*ending), whole)
    finally:
        mx.enable_compile()
    assert len(shapes) == min(40, longest(whole) + 1)
    assert [count for _, count in shapes] == [
        buffer_length(step + 1, 4) for step in range(len(shapes))
    ]
    assert len({rows for rows, _ in shapes}) > 2
    assert {count for _, count in built} == {count for _, count in shapes} > {4, 8, 16}
    if kernels:
        times = Counter(shapes)
        assert len(built) == sum(min(2, count) for count in times.values()) < len(shapes)
    else:
        assert len(built) == len(shapes)


def test_recorder():
    """The first step of a shape runs, the second is compiled, and what is compiled is run again, on
    what the state holds then."""
    state = {"total": mx.array(0.0), "nested": [[mx.array([1.0, 2.0])]]}
    built = []

    def step(name):
        built.append(name)
        state["total"] = state["total"] + state["nested"][0][0].sum()
        return [state["total"] * 2]

    its = recorder.Recorder(state, compiles=True)
    found = [its.run(name, partial(step, name))[0].item() for name in ("a", "a", "a")]
    state["nested"][0][0] = mx.array([5.0])
    found += [its.run(name, partial(step, name))[0].item() for name in ("b", "b", "b", "a")]
    assert found == [6.0, 12.0, 18.0, 28.0, 38.0, 48.0, 58.0]
    assert built == ["a", "a", "b", "b", "a"]
    its = recorder.Recorder(state, compiles=False)
    built.clear()
    for _ in range(3):
        its.run("a", partial(step, "a"))
    assert built == ["a", "a", "a"]


def test_few_prompts_run_at_a_time(case, ending, monkeypatch):
    """However they are cut, and with buffers of keys that grow, completions are the same."""
    calls = []
    watch(monkeypatch, "opd_mlx.sampling.prefill", lambda _, some: calls.append(some.shape))
    whole = case.loaded.backend().sample(*ending)
    calls.clear()
    most = max(map(len, ending[0]))
    few = case.loaded.backend(prefill_tokens=2 * most, cache_tokens=3)
    same(case, few.sample(*ending), whole)
    assert [count for count, _ in calls] == [2, 2]
    assert calls[0][1] != calls[1][1] or case.kind == "smolvlm"


@pytest.mark.parametrize("change", ["nothing", "an empty group", "other order"])
def test_a_small_rollouts_pass_serves_the_backward(case, ending, monkeypatch, change):
    """Once, for just its prompts in any order."""
    backend, fresh = case.loaded.backend(), case.loaded.backend()
    groups = [case.groups[place] for place in (0, 2, 3)]
    prompts = [group.student for group in groups]
    prefill = backend.prefill(prompts)
    backend.sample(prompts, ending[1][:3], ending[2], prefill=prefill)
    if change == "other order":
        groups, prefill.order = groups[::-1], (2, 1, 0)
    if change == "an empty group":
        groups[1] = replace(groups[1], completions=(), weights=())
    calls = []
    watch(monkeypatch, "opd_mlx.gradient.run_prompts", lambda *_: calls.append(1))
    rows = backend.accumulate(groups, JSD, 0, prefill)
    assert bool(calls) == (change == "an empty group")
    expected = fresh.accumulate(groups, JSD)
    assert relative_error(backend.tensors("gradient"), fresh.tensors("gradient")) < 2e-5
    for row, other in zip(rows, expected, strict=True):
        for one, another in zip(row, other, strict=True):
            np.testing.assert_allclose(one.divergence, another.divergence, rtol=1e-4, atol=1e-6)
    calls.clear()
    backend.accumulate(groups, JSD)
    assert calls
