"""What runs while the torch backend samples: prompts in parts, rows that still live, and one pass
over prompts for rollout and gradient."""

from __future__ import annotations

import dataclasses
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from opd.objective import Objective
from opd.types import Group, Sampling
from opd_torch.kernels import recorder
from opd_torch.kernels.rotary import rotary_factors, rotate, rotated_heads
from opd_torch.ragged import Ragged
from tests.support import random_models
from tests.support.torch_cases import (
    StepByStep,
    make_case,
    relative_error,
    rows_of,
)

JSD = Objective(alpha=0.5, top_k=20)


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    made = make_case(root, random_models.FAMILIES[request.param](root / "model"))
    made.kind = request.param
    return made


@pytest.fixture(scope="module")
def double(case):
    return case.loaded()


def prompts_of(case):
    return [group.student for group in case.groups[:4]]


def same(ours, theirs, most=1e-6):
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=most)
        assert one.finished == other.finished


def test_completions_that_have_ended_leave_the_batch(case, double):
    """Stop tokens are chosen so that most rows end early; only rows of prompts with a live
    completion, as many as live, go on."""
    prompts, uniforms = (
        prompts_of(case),
        np.random.default_rng(5).random((4, 3, 14), dtype=np.float32),
    )
    free = double.backend().sample(prompts, uniforms, Sampling(1.0))
    early = {int(one.tokens[2 + 3 * (number % 2)]) for number, one in enumerate(chain(*free))}
    stop = tuple(early - {int(token) for token in free[1][0].tokens})  # that one runs to its end
    whole = double.backend(compact_below=0.0).sample(prompts, uniforms, Sampling(1.0, stop))
    model = double.on()
    backend, seen = double.backend(model), rows_of(model)
    same(backend.sample(prompts, uniforms, Sampling(1.0, stop)), whole)
    lengths = np.array([[len(completion) for completion in row] for row in whole])
    expected, held = [], (4, 3)
    for step in range(lengths.max()):
        expected.append(held[0] * held[1])
        live = lengths > step + 1
        needed = int(live.any(1).sum()), int(live.sum(1).max())
        held = needed if needed[0] * needed[1] <= 0.75 * held[0] * held[1] else held
    assert seen[1:] == expected
    assert expected[-1] < expected[0]


def test_questions_are_rare_on_a_gpu(case, double):
    """Where the host asks every few tokens only, rows that ended between two questions run on, and
    nothing changes."""
    prompts, uniforms = (
        prompts_of(case),
        np.random.default_rng(6).random((4, 2, 9), dtype=np.float32),
    )
    stop = (int(double.backend().sample(prompts, uniforms, Sampling(1.0))[1][0].tokens[3]),)
    whole = double.backend().sample(prompts, uniforms, Sampling(1.0, stop))
    same(double.backend(check_every=4).sample(prompts, uniforms, Sampling(1.0, stop)), whole)


@pytest.mark.parametrize("multiple", [1, 8])
def test_recorded_steps(case, double, multiple):
    """As a GPU runs them: every step of one shape is the step that was recorded, reads whole
    buffers, and masks what stands behind its row; prompts may be padded. Rows leave, and buffers
    double."""
    shapes = []

    def record(step):
        shapes.append((len(step.args[0].rows), step.args[1].count))
        return StepByStep(step)

    prompts, uniforms = (
        prompts_of(case),
        np.random.default_rng(8).random((4, 3, 14), dtype=np.float32),
    )
    free = double.backend().sample(prompts, uniforms, Sampling(0.9))
    stop = tuple(
        {int(one.tokens[4]) for one in chain(*free)} - {int(token) for token in free[2][1].tokens}
    )
    whole = double.backend().sample(prompts, uniforms, Sampling(0.9, stop))
    backend = double.backend(
        check_every=3,
        record_step=record,
        recorded_rows=1,
        cache_tokens=4,
        prompt_multiple=multiple,
    )
    same(
        backend.sample(prompts, uniforms, Sampling(0.9, stop)),
        whole,
        most=1e-5 if case.kind == "qwen3_5" else 1e-6,
    )
    assert {count for _, count in shapes} == {4, 8, 16}
    assert len({rows for rows, _ in shapes}) > 1


@pytest.mark.parametrize("refused", [False, True])
def test_recorder(monkeypatch, caplog, refused):
    """The first step of a shape runs, the second is recorded, and what is recorded is run again;
    what CUDA refuses runs every time."""
    ran, recorded = [], []

    class Graph:
        def __init__(self, step):
            self.replay = lambda: ran.append("again")

    def record(step):
        recorded.append(step)
        if refused:
            raise RuntimeError("operation not permitted\nwhen a stream is captured")
        return Graph(step)

    monkeypatch.setattr(recorder.Recorder, "refused", False)

    def model(record=record, family="any", dtype=torch.float32):
        module = SimpleNamespace(parameters=lambda: [torch.zeros(1, dtype=dtype)])
        return SimpleNamespace(
            device=SimpleNamespace(record_step=record), family=family, module=module
        )

    its = recorder.Recorder(model())
    for shape in ("a", "a", "a", "b", "b"):
        its.run(shape, lambda shape=shape: ran.append(shape))
    if refused:
        assert (ran, len(recorded)) == (["a", "a", "a", "b", "b"], 1)
        assert [record.getMessage() for record in caplog.records] == [
            "token steps run one by one, several times slower: CUDA cannot record them (operation"
            " not permitted)"
        ]
    else:
        assert (ran, len(recorded)) == (["a", "again", "again", "b", "again"], 2)
    assert its.records
    assert not recorder.Recorder(model(record=None)).records
    assert not recorder.Recorder(model(family=None)).records
    assert not recorder.Recorder(model(dtype=torch.uint8)).records


def test_prompts_run_in_parts(case, double):
    prompts, uniforms = (
        prompts_of(case),
        np.random.default_rng(7).random((4, 2, 6), dtype=np.float32),
    )
    whole = double.backend().sample(prompts, uniforms, Sampling(1.0))
    lengths = [len(prompt) for prompt in prompts]
    model = double.on(prefill_tokens=lengths[0] + lengths[1])
    backend, seen = double.backend(model), rows_of(model)
    same(backend.sample(prompts, uniforms, Sampling(1.0)), whole)
    parts, room = [], 0
    for length in lengths:
        if length > room:
            parts, room = [*parts, 0], lengths[0] + lengths[1]
        parts[-1], room = parts[-1] + length - 1, room - length
    assert len(parts) > 1
    assert seen[: len(parts) + 1] == [*parts, 8]


def test_short_prompts_do_not_run_padded_to_long_ones(case, double):
    """Of less than half their length, they run apart; greedily, since a pass that is kept is
    one."""
    long, middle, short = (case.encoder.encode([], "digit " * count) for count in (60, 40, 1))
    assert 2 * len(short) < len(long) <= 2 * len(middle) < 2 * len(long)
    prompts, uniforms = [long, long, middle, short, short], np.zeros((5, 1, 4), np.float32)
    model = double.on()
    backend, seen = double.backend(model), rows_of(model)
    found = backend.sample(prompts, uniforms, Sampling(0.0))
    assert seen[:2] == [2 * (len(long) - 1) + len(middle) - 1, 2 * (len(short) - 1)]
    for prompt, its in zip(prompts, found, strict=True):
        # The norms of Qwen3.5 are float32 in a float64 model too, and round otherwise where rows
        # stand in another layout.
        same(
            double.backend().sample([prompt], uniforms[:1], Sampling(0.0)),
            [its],
            most=1e-5 if case.kind == "qwen3_5" else 1e-6,
        )


def rolled_out(backend, case):
    """A rollout's prefill, and groups of what it sampled in another order than the prompts'."""
    groups = case.groups[:3]
    prompts = [group.student for group in groups]
    prefill = backend.prefill(prompts)
    sampled = backend.sample(
        prompts, np.full((3, 2, 4), 0.6, np.float32), Sampling(1.0), prefill=prefill
    )
    made = [
        Group(
            group.student,
            group.teacher,
            tuple(row),
            tuple(np.full(len(one), 0.1, np.float32) for one in row),
        )
        for group, row in zip(groups, sampled, strict=True)
    ]
    if prefill:
        prefill.order = (2, 0, 1)
    return prefill, [made[index] for index in (2, 0, 1)]


@pytest.mark.parametrize("change", ["order", "empty", "bound"])
def test_a_rollouts_pass_over_prompts_serves_the_gradient(case, double, change):
    """Once, in any order, and where it is small: else prompts run again."""
    model, other = double.on(checkpoint_above=0 if change == "bound" else 2**60), double.backend()
    backend = double.backend(model)
    prefill, groups = rolled_out(backend, case)
    assert (prefill is None) == (change == "bound")
    if change == "empty":
        groups[0] = dataclasses.replace(groups[0], completions=(), weights=())
    if change == "bound":
        model = double.on(checkpoint_above=2**60)
        backend = double.backend(model)
    seen = rows_of(model)
    backend.accumulate(groups, JSD, 0, prefill)
    prompts = sum(len(group.student) - 1 for group in groups if group.tokens)
    assert seen.count(prompts) == (0 if change == "order" else 1)
    other.accumulate(groups, JSD)
    assert relative_error(backend.tensors("gradient"), other.tensors("gradient")) < 1e-6
    seen.clear()
    backend.accumulate(groups, JSD)
    assert seen.count(prompts) == 1


@pytest.mark.parametrize("width", [6, 8])
def test_rotation(width):
    """Value and gradient, against the formula; angles may be narrower than a head. Pairs come to
    stand side by side."""
    generator = torch.Generator().manual_seed(0)
    heads, gradient = (
        torch.randn(5, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    cosines, sines = (
        torch.randn(5, 1, width // 2, generator=generator, dtype=torch.float64).repeat(1, 1, 2)
        for _ in range(2)
    )

    def plain(x):
        first, second = x[..., :width].chunk(2, -1)
        return torch.cat(
            [x[..., :width] * cosines + torch.cat([-second, first], -1) * sines, x[..., width:]], -1
        )

    ours, theirs = heads.clone().requires_grad_(), heads.clone().requires_grad_()
    pairs = [*np.arange(width).reshape(2, -1).T.ravel(), *range(width, 8)]
    out, wanted = rotate(ours, rotary_factors(cosines, sines)), plain(theirs)[..., pairs]
    torch.testing.assert_close(out, wanted)
    out.backward(gradient)
    wanted.backward(gradient)
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotated_heads(dtype):
    generator = torch.Generator().manual_seed(0)
    packed = torch.randn(2, 5, 3, 2, 6, generator=generator).to(dtype)
    cosines, sines = (
        torch.randn(5, 1, 1, 3, generator=generator).repeat(1, 1, 1, 2) for _ in range(2)
    )
    gradients = [torch.randn(2, 5, 2, 6, generator=generator).to(dtype) for _ in range(3)]
    ours, theirs = packed.clone().requires_grad_(), packed.clone().requires_grad_()
    wide = theirs[:, :, :2].float()
    first, second = wide.chunk(2, -1)
    turned = (wide * cosines + torch.cat([-second, first], -1) * sines).to(dtype)[
        ..., [0, 3, 1, 4, 2, 5]
    ]
    out, wanted = (
        rotated_heads(ours, rotary_factors(cosines, sines)),
        (
            *turned.unbind(2),
            theirs[:, :, 2],
        ),
    )
    for one, other in zip(out, wanted, strict=True):
        torch.testing.assert_close(one, other)
    torch.autograd.backward(out, gradients)
    torch.autograd.backward(wanted, gradients)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_ragged_wider_than_its_rows():
    ragged = Ragged(np.array([2, 1]), torch.device("cpu"), 4)
    packed = torch.arange(1.0, 4.0)
    assert ragged.fill(packed, 0.0).tolist() == [[1, 2, 0, 0], [3, 0, 0, 0]]
    assert ragged.unpad(ragged.pad(packed)).tolist() == packed.tolist()
