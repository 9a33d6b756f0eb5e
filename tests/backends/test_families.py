"""Every family on every backend against stock transformers in float64, a plain row a completion.

Values, gradients, samples and files; and MLX against torch. mlx-vlm's forwards are no reference
here: Gemma 3's masks and Idefics3's padding are not the model's there.
"""

from __future__ import annotations

from functools import cache
from itertools import chain

import numpy as np
import pytest
from safetensors.numpy import load_file

torch_cases = pytest.importorskip("tests.support.torch_cases")

from opd.objective import Objective
from opd.testing.conformance import check
from opd.types import Completion, Group, ModelOptions, Sampling, Update
from tests.conftest import INSTALLED, twin_of
from tests.support import random_models
from tests.support.cases import distribution_of, loss_of, norm_of, relative_error, weighted_groups

JSD = Objective(alpha=0.5, top_k=20)
ROUGH = "qwen3_5"
"""The family whose gated norms, of little, float32 and bfloat16 take far from float64."""


@pytest.fixture(scope="module", params=random_models.FAMILIES)
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    folder = random_models.raise_norms(random_models.FAMILIES[request.param](root / "model"))
    with torch_cases.delta_rule_in_float64():
        made = torch_cases.make_case(root, folder)
        made.kind = request.param
        yield made


@pytest.fixture(scope="module")
def opened(case):
    """The case's model on a backend, loaded once."""
    return cache(lambda name: twin_of(name).loaded(case))


@pytest.fixture
def backend(opened, twin):
    return opened(twin.NAME).backend(**twin.GPU)


@pytest.fixture(scope="module")
def stock(case):
    """The policies as transformers has them, in float64."""
    return cache(case.stock)


@pytest.fixture(scope="module")
def expected(case):
    return torch_cases.plain_loss_and_gradients(case, case.groups, JSD)


def logprobs_near(twin, case):
    """Bounds for log-probabilities of the case on a backend."""
    if twin.DTYPE == "float32":
        return {"atol": 1e-3 if case.kind == ROUGH else 2e-5}
    return {"rtol": 1e-5}


def check_gradient(twin, backend, gradients, bound):
    """All gradients are near, and what has none here has none there."""
    found = backend.tensors("gradient")
    assert all(not found[name].any() for name in found.keys() - gradients.keys())
    assert relative_error({name: found[name] for name in gradients}, gradients) < bound
    smallest = min(np.abs(value).max() for value in gradients.values())
    assert smallest > 0, "a parameter without gradient proves nothing"


@pytest.mark.parametrize("recomputed", [False, True])
def test_loss_and_every_gradient(case, opened, twin, expected, recomputed):
    """Prompts, images and completions of unequal sizes and numbers in one call.

    Recomputed in the backward: layers, and on MLX the segments of a delta net.
    """
    assert len({len(group.student) for group in case.groups}) == 4
    settings = {"checkpoint_above": 0, **twin.SEGMENTS} if recomputed else {}
    backend = opened(twin.NAME).backend(**twin.GPU, **settings)
    loss, gradients = expected
    found = loss_of(case.groups, backend.accumulate(case.groups, JSD))
    assert found == pytest.approx(loss, rel=twin.LOSS)
    check_gradient(twin, backend, gradients, twin.GRADIENT)


def test_a_completion_longer_than_the_window(case, backend, twin):
    """Beside a short one.

    In Gemma 3 its last rows see neither the prompt nor its own first tokens in sliding layers.
    """
    rng, old = np.random.default_rng(4), case.groups[0]
    allowed = np.setdiff1d(np.arange(250), case.encoder.banned)
    tokens = [rng.choice(allowed, length).astype(np.int32) for length in (24, 2)]
    completions = tuple(Completion(one, np.full(len(one), -5, np.float32), False) for one in tokens)
    weights = tuple(rng.uniform(0.1, 1, len(one)).astype(np.float32) for one in tokens)
    groups = [Group(old.student, old.teacher, completions, weights)]
    loss, gradients = torch_cases.plain_loss_and_gradients(case, groups, JSD)
    found = loss_of(groups, backend.accumulate(groups, JSD))
    assert found == pytest.approx(loss, rel=twin.LOSS)
    # transformers' norms are float32 in a float64 model; over more rows that shows.
    gradients = {name: value for name, value in gradients.items() if value.any()}
    check_gradient(twin, backend, gradients, max(1e-5, twin.GRADIENT))


def test_score_is_the_stock_distribution(case, backend, twin, stock):
    near = {**logprobs_near(twin, case), **({"rtol": 1e-6} if twin.DTYPE == "float64" else {})}
    scored = backend.score(case.groups, JSD, top=3)
    assert norm_of(backend.tensors("gradient")) == 0
    for group, row in zip(case.groups, scored, strict=True):
        for completion, one in zip(group.completions, row, strict=True):
            for policy in ("student", "teacher"):
                logits = torch_cases.logits_of(
                    stock(policy), getattr(group, policy), completion.tokens
                )
                wanted, top = distribution_of(logits), getattr(one, f"{policy}_top")
                likeliest = -np.sort(-wanted, -1)[:, :3]
                chosen = wanted[range(len(completion)), completion.tokens]
                np.testing.assert_allclose(getattr(one, f"{policy}_logprobs"), chosen, **near)
                np.testing.assert_allclose(top.logprobs, likeliest, **near)
                if "atol" not in near or case.kind != ROUGH:
                    np.testing.assert_array_equal(top.tokens, np.argsort(-wanted, -1)[:, :3])


@pytest.mark.parametrize(
    ("temperature", "policy"), [(1.0, "student"), (0.7, "teacher"), (0.0, "student")]
)
def test_samples_are_the_stock_distributions(case, backend, twin, stock, temperature, policy):
    """Longer than any window; greedy, or by inverse CDF, from whole rows without a cache.

    Likely tokens are banned, so that a ban that comes too late shows.
    """
    model, length = stock(policy), 20
    prompts = [group.student for group in case.groups[:3]]
    none = np.zeros(1, np.int32)
    first = [int(torch_cases.logits_of(model, prompt, none).argmax()) for prompt in prompts]
    banned = tuple(sorted({*case.encoder.banned, *first[:2]}))
    uniforms = np.random.default_rng(1).random((3, 2, length), dtype=np.float32)
    uniforms[0, 0, :2] = 0.0, np.nextafter(np.float32(1), np.float32(0))
    sampled = backend.sample(prompts, uniforms, Sampling(temperature, (), banned), policy)
    assert [len(row) for row in sampled] == [2] * 3
    for prompt, row, draws in zip(prompts, sampled, uniforms, strict=True):
        for completion, u in zip(row, draws, strict=True):
            logits = torch_cases.logits_of(model, prompt, completion.tokens)
            logprobs = distribution_of(logits, temperature or 1.0, banned)
            ends = np.cumsum(np.exp(logprobs), -1)
            wanted = (ends > u[:, None]).argmax(-1) if temperature else logprobs.argmax(-1)
            np.testing.assert_array_equal(completion.tokens, wanted)
            chosen = logprobs[range(length), completion.tokens]
            np.testing.assert_allclose(completion.logprobs, chosen, **logprobs_near(twin, case))
            assert not completion.finished


def test_attention_is_the_stock_models(case, backend, twin, stock):
    """Prompts and completions of unequal lengths together, longer than Gemma 3's window; a prompt
    without completions shows its last token."""
    rng, groups = np.random.default_rng(5), case.groups[:4]
    lengths = [(5, 24), (), (1,), (3, 2, 7)]
    tokens = [[rng.integers(10, 250, n).astype(np.int32) for n in some] for some in lengths]
    members = [
        [Completion(one, np.zeros(len(one), np.float32), False) for one in some] for some in tokens
    ]
    near = 1e-4 if case.kind == ROUGH else 2e-6
    for policy in ("student", "teacher"):
        found = backend.attend([group.student for group in groups], members, policy)
        for group, some, arrays in zip(groups, tokens, found, strict=True):
            for one, weights in zip(some or [np.zeros(1, np.int32)], arrays, strict=True):
                wanted = torch_cases.stock_attention(stock(policy), group.student, one)
                assert weights.dtype == np.float32
                assert 0.01 < wanted.sum(-1).max() <= 1
                np.testing.assert_allclose(weights, wanted, atol=near)


def test_text_without_images(case, backend, twin, stock):
    """Alone, and beside a prompt with an image."""
    prompt, uniforms = case.encoder.encode([], "What digit?"), np.full((2, 1, 3), 0.5, np.float32)
    sampled = backend.sample([prompt], uniforms[:1], Sampling(1.0))[0][0]
    mixed = backend.sample([case.groups[0].student, prompt], uniforms, Sampling(1.0))[1][0]
    np.testing.assert_array_equal(mixed.tokens, sampled.tokens)
    logits = torch_cases.logits_of(stock("student"), prompt, sampled.tokens)
    wanted = distribution_of(logits)[range(3), sampled.tokens]
    for one in (sampled, mixed):
        np.testing.assert_allclose(one.logprobs, wanted, **logprobs_near(twin, case))


def test_frozen_vision(case, backend, twin):
    """Tower and projector keep still, the rest has the gradient it had, and images run once."""
    options = ModelOptions(case.folder, twin.DTYPE, tune_vision=False)
    loaded = twin.opened(options)
    model = loaded.on()
    frozen = loaded.backend(model)
    trained, every = frozen.tensors("student").keys(), backend.tensors("student").keys()
    parts = ("visual", "vision", "projector", "connector")
    assert trained < every
    assert trained == {name for name in every if not any(part in name for part in parts)}
    backend.move_teacher(1.0)
    groups = weighted_groups(case.encoder)
    for one in (frozen, backend):
        one.accumulate(groups, JSD)
    found, wanted = frozen.tensors("gradient"), backend.tensors("gradient")
    ours, theirs = ({name: one[name] for name in trained} for one in (found, wanted))
    assert relative_error(ours, theirs) < min(twin.SPLIT, 1e-5)
    assert model.feature_cache.nbytes > 0


@pytest.mark.slow
def test_conformance(case, twin):
    """On clones of one model: test_conformance.py loads Qwen3-VL for every check."""
    if case.kind == "qwen3_vl":
        pytest.skip("stands in test_conformance.py")
    pairs = [(group.student, group.teacher) for group in case.groups[: twin.PAIRS]]
    loaded, encoder = twin.opened(ModelOptions(case.folder), **twin.GPU), case.encoder
    results = check(loaded.backend, pairs, encoder.stop, encoder.banned)
    assert [str(result) for result in results if not result.passed] == []


def test_files(case, backend, twin, tmp_path):
    """A state comes back; an export has the published names, and gives the trained logits."""
    backend.accumulate(case.groups, JSD)
    assert backend.apply(Update(1e-2)).taken
    backend.save(tmp_path / "state")
    other = twin.load(ModelOptions(case.folder, twin.DTYPE))
    other.load(tmp_path / "state")
    for policy in ("student", "teacher"):
        found, saved = other.tensors(policy), backend.tensors(policy)
        assert all(np.array_equal(value, saved[name]) for name, value in found.items())
    out = tmp_path / "out"
    backend.export(out, "model")
    weights = (load_file(folder / "model.safetensors") for folder in (case.folder, out))
    shapes, exported = ({name: one.shape for name, one in held.items()} for held in weights)
    assert exported == shapes
    assert (out / "config.json").read_bytes() == (case.folder / "config.json").read_bytes()
    group, model = case.groups[2], torch_cases.exported(out)
    tokens = group.completions[0].tokens
    wanted, before = (
        distribution_of(torch_cases.logits_of(one, group.student, tokens))
        for one in (model, case.stock())
    )
    scored = backend.score([group], JSD)[0][0].student_logprobs
    near = {"rtol": 1e-5} if twin.DTYPE == "float64" else logprobs_near(twin, case)
    # The file is float32, whatever the backend computes in here.
    np.testing.assert_allclose(scored, wanted[range(len(tokens)), tokens], **near)
    assert np.abs(wanted - before).max() > 1e-2


def test_bfloat16_is_near(case, backend, twin, stock):
    """Near the exact gradient as a whole, accumulated in float32 on float32 masters.

    transformers' own autocast takes the delta net's gradient 0.34 away.
    """
    rough, groups, exact = case.kind == ROUGH, case.groups[:2], backend
    backend = twin.backend(case, "bfloat16")
    loss, found = (loss_of(case.groups, one.score(case.groups, JSD)) for one in (exact, backend))
    near = case.kind == "qwen3_vl"
    assert found == pytest.approx(loss, rel=0.05 if near else 0.1)
    for one in (exact, backend):
        one.accumulate(groups, JSD)
    gradients = exact.tensors("gradient"), backend.tensors("gradient")
    difference = {name: value - gradients[1][name] for name, value in gradients[0].items()}
    bound = 0.1 if near else twin.HALF[rough]
    assert 1e-4 < norm_of(difference) / norm_of(gradients[0]) < bound
    for kind in ("student", "gradient"):  # as they are held: bfloat16 has no array in numpy
        assert {value.dtype for value in backend.tensors(kind).values()} == {np.dtype("float32")}
    prompt = groups[0].student
    sampled = tuple(backend.sample([prompt], np.full((1, 2, 4), 0.5, np.float32), Sampling(1.0))[0])
    weights = tuple(np.ones(4, np.float32) for _ in sampled)
    scored = backend.score([Group(prompt, prompt, sampled, weights)], JSD)[0]
    for one, other in zip(sampled, scored, strict=True):
        np.testing.assert_allclose(one.logprobs, other.student_logprobs, atol=0.2)
    if near:
        draws = np.full((1, 2, 4), 0.4, np.float32)
        ours, theirs = (
            one.sample([prompt], draws, Sampling(1.0))[0][0] for one in (backend, exact)
        )
        np.testing.assert_allclose(ours.logprobs[:1], theirs.logprobs[:1], atol=0.1)
    for one in sampled:
        logits = torch_cases.logits_of(stock("student"), prompt, one.tokens)
        wanted = distribution_of(logits)[range(4), one.tokens]
        np.testing.assert_allclose(one.logprobs, wanted, atol=0.8 if rough else 0.2)


@pytest.fixture(scope="module")
def loaded(case):
    """MLX, and torch in the same precision."""
    if len(INSTALLED) < 2:
        pytest.skip("needs both backends")
    return {name: twin_of(name).loaded(case, "float32") for name in ("mlx", "cpu")}


@pytest.fixture
def both(loaded):
    return [one.backend() for one in loaded.values()]


def test_mlx_computes_what_torch_computes(case, both):
    near = logprobs_near(twin_of("mlx"), case)
    ours, theirs = (backend.accumulate(case.groups, JSD) for backend in both)
    fields = ("student_logprobs", "teacher_logprobs", "student_entropy", "teacher_entropy")
    for one, other in zip(chain(*ours), chain(*theirs), strict=True):
        for name in (*fields, "divergence"):
            found, wanted = getattr(one, name), getattr(other, name)
            np.testing.assert_allclose(found, wanted, **near, err_msg=name)
    loss = loss_of(case.groups, theirs)
    assert loss_of(case.groups, ours) == pytest.approx(loss, rel=1e-4)
    assert relative_error(*(backend.tensors("gradient") for backend in both)) < 1e-4


def test_mlx_samples_what_torch_samples(case, both):
    uniforms = np.random.default_rng(0).random((len(case.groups), 2, 20), dtype=np.float32)
    sampling = Sampling(1.0, case.encoder.stop, case.encoder.banned)
    prompts = [group.student for group in case.groups]
    ours, theirs = (chain(*backend.sample(prompts, uniforms, sampling)) for backend in both)
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        near = logprobs_near(twin_of("mlx"), case)
        np.testing.assert_allclose(one.logprobs, other.logprobs, **near)


def test_each_reads_the_others_checkpoint(case, both, tmp_path):
    for writer, reader in (both[::-1], both):
        writer.save(tmp_path)
        reader.move_teacher(1.0)
        reader.load(tmp_path)
        for policy in ("student", "teacher"):
            found, expected = reader.tensors(policy), writer.tensors(policy)
            assert found.keys() == expected.keys()
            assert all(np.array_equal(value, expected[key]) for key, value in found.items())
